"""Rules of everybody else that are taken out: monitor, routers, prefill workers."""

from tests.simulation.mutant import Mutant

_REMOVALS = "services/monitor/removals.py"
_VOID_ROUNDS = "services/monitor/void_rounds.py"
_GROUP = "services/monitor/group.py"
_LIFECYCLE = "services/router/request_lifecycle.py"

SERVICE_MUTANTS = (
    Mutant(
        "verdict-by-accusation",
        (
            (
                _VOID_ROUNDS,
                "        roll_call.answers[process] = accused\n",
                "        roll_call.answers[process] = accused\n"
                "        if guilty := [m.process for m in self._group.members if m.rank in accused]:\n"
                "            self._removals.remove([Removal(g, 'accused', now) for g in guilty], now)\n"
                "            return\n",
            ),
        ),
        by_test="tests/unit/monitor/test_void_rounds.py",
        seed=7,
        plot="paths",
    ),
    Mutant(
        "epoch-numbers-reused",
        (
            (
                _GROUP,
                "        view = self._make_view(self._counter.take(), members, reason)\n",
                "        view = self._make_view(Epoch(self._counter._highest + 1), members, reason)\n",
            ),
            (
                _GROUP,
                "        self.current, self.prepared, self.is_adopted = prepared.view, None, True\n",
                "        self.current, self.prepared, self.is_adopted = prepared.view, None, True\n"
                "        self._counter.heard(prepared.view.epoch)\n",
            ),
        ),
        seed=7,
        plot="joins",
    ),
    Mutant(
        "no-term-after-a-restart",
        (
            (
                "services/monitor/terms.py",
                "self.term = self._highest = (self._highest // TERM_SIZE + 1) * TERM_SIZE",
                "self.term, self._highest = TERM_SIZE, max(self._highest, TERM_SIZE)",
            ),
        ),
        seed=7,
    ),
    Mutant(
        "a-gap-is-not-seen",
        (
            (_LIFECYCLE, "        if tokens.start > have:\n            return self._ask_for_gap(now)\n", ""),
            (_LIFECYCLE, "new = tokens.ids[have - tokens.start :]", "new = tokens.ids[max(have - tokens.start, 0) :]"),
        ),
        seed=0,
    ),
    Mutant(
        "doubled-tokens-are-taken",
        ((_LIFECYCLE, "new = tokens.ids[have - tokens.start :]", "new = tokens.ids"),),
        seed=1,
    ),
    Mutant(
        "a-slot-given-out-before-its-process-is-gone",
        (
            (
                _REMOVALS,
                "is Fate.FENCE:\n                self._slots.fence(slot, now, removal.evidence)\n",
                "is Fate.FENCE:\n                self._slots.free(slot, now, removal.evidence)\n",
            ),
        ),
        plot="zombie",
        by_test="tests/unit/monitor/test_membership.py",
        seed=0,
    ),
    Mutant(
        "a-void-round-without-a-new-view",
        (
            (
                _VOID_ROUNDS,
                "            self._removals.publish_same_members(f",
                "            self._removals.roll_call = None\n            (lambda *_: None)(f",
            ),
        ),
        by_test="tests/unit/monitor/test_void_rounds.py",
        seed=16,
        plot="stops",
    ),
    Mutant(
        "a-late-monitor-trusts-its-timers",
        (("services/monitor/ticks.py", "min(now, self._last_tick) - max(since, self._restarted_at)", "now - since"),),
        seed=14,
        plot="monitor",
    ),
    Mutant(
        "a-removed-rank-keeps-its-requests",
        (
            (
                "services/router/request_table.py",
                "            if request.place is not None and not self._holds(request.place):\n",
                "            if False and request.place is not None and not self._holds(request.place):\n",
            ),
        ),
        seed=0,
    ),
    Mutant(
        "the-next-number-for-a-term",
        (
            (
                "services/monitor/terms.py",
                "self.term = self._highest = (self._highest // TERM_SIZE + 1) * TERM_SIZE",
                "self.term = self._highest = self._highest + 1",
            ),
        ),
        num_seeds=0,
        by_test="tests/unit/monitor/test_takeover.py::test_numbers_of_which_nobody_was_heard_are_not_used_again",
    ),
    Mutant(
        "a-roll-call-forgives-silence",
        (
            (
                _VOID_ROUNDS,
                "self._removals.remove(silent, now)",
                "self._removals.publish_same_members(evidence, now)",
            ),
        ),
        seed=31,
    ),
    Mutant(
        "versions-of-the-directory-begin-anew",
        (("services/monitor/directory.py", "if term != self._term:", "if True:"),),
        num_seeds=0,
        by_test="tests/unit/monitor/test_takeover.py::test_versions_of_the_directory_never_fall_within_a_term",
    ),
    Mutant(
        "a-new-monitor-does-not-hear-the-members-out",
        (
            (
                "services/monitor/takeover.py",
                "        if waited_s >= self._config.heartbeat_timeout_s:\n            return True\n",
                "        if waited_s >= _GATHER_AT_LEAST_S:\n            return True\n",
            ),
        ),
        by_test="tests/unit/monitor/test_takeover.py",
    ),
    Mutant(
        "a-join-in-force-before-the-newcomer-says-so",
        (
            (
                "services/monitor/prepared_view.py",
                "        return not self.waiting",
                "        return not set(self.waiting) - set(self.newcomers if self.base else ())",
            ),
        ),
        seed=3,
    ),
    Mutant(
        "a-view-that-only-some-enter-is-waited-for",
        (
            (
                "services/monitor/failure_detector.py",
                "if prepared is None or not prepared.entered or prepared.is_in_force:",
                "if True:",
            ),
        ),
        num_seeds=0,
        by_test="tests/unit/monitor/test_joins.py",
    ),
    Mutant(
        "request-ids-reused-by-the-next-router",
        (
            (
                "common/ids.py",
                '    return RequestId(f"{router_nonce:016x}.{number}")',
                '    return RequestId(f"0.{number}")',
            ),
        ),
        seed=6,
    ),
    Mutant(
        "cached-prefixes-evicted-while-they-are-read",
        (
            (
                "services/prefill/prefix_cache.py",
                "            node.num_pins += 1\n            self._idle.pop(node, None)\n",
                "            node.num_pins += 1\n",
            ),
        ),
        seed=0,
    ),
    Mutant(
        "a-masked-rank-gets-a-number-of-one-unheard",
        (
            (
                "services/monitor/joining.py",
                "        if self._unheard:\n            return\n        claimed",
                "        claimed",
            ),
        ),
        num_seeds=0,
        by_test="tests/unit/monitor/test_takeover.py",
    ),
    Mutant(
        "a-newcomer-without-a-path-is-waited-for",
        (("services/monitor/membership.py", "            if unreached is not None:", "            if False:"),),
        num_seeds=0,
        by_test="tests/unit/monitor/test_join_paths.py",
    ),
)
