"""The rules that are taken out of the shipped files, one at a time."""

from dataclasses import dataclass

Edit = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Mutant:
    """``edits``: (file, old text, new text); the old text stands there exactly once.

    ``plot``: what the stories are about (`plots`). ``seed``: of the story that caught it last; it is tried first.
    ``by_test``: the test that catches what stories show rarely or never. ``num_seeds`` bound the search without both.
    """

    name: str
    edits: tuple[Edit, ...]
    num_seeds: int = 400
    by_test: str = ""
    seed: int | None = None
    plot: str = ""


_WAIT = "kernels/word_wait.py"
_REFERENCE = "kernels/reference.py"
_HEADERS = "kernels/header_exchange.py"
_ENGINE = "services/decode/rank_engine.py"
_DELIVERY = "services/decode/delivery.py"
_RANK = "services/decode/membership.py"
_REMOVALS = "services/monitor/removals.py"
_VOID_ROUNDS = "services/monitor/void_rounds.py"
_GROUP = "services/monitor/group.py"
_LIFECYCLE = "services/router/request_lifecycle.py"

MUTANTS = (
    Mutant(
        "no-epoch-in-poison",
        ((_WAIT, "elif fault is None and any(poison[member] >= floor for member in members):", "elif any(poison):"),),
        seed=0,
    ),
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
        "a-void-rank-publishes",
        (
            (
                _REFERENCE,
                "        if not self._await_words(self._own.dispatch_wait, step, self.deadline_s):\n"
                "            return None\n",
                "        self._await_words(self._own.dispatch_wait, step, self.deadline_s)\n",
            ),
            (
                _REFERENCE,
                "        if self.status == VOID:\n            return None\n        if received.step",
                "        if received.step",
            ),
        ),
        by_test="tests/kernels/test_ep_waits.py::test_a_void_rank_publishes_nothing_more",
    ),
    Mutant(
        "commit-before-the-status-word",
        (
            (
                _REFERENCE,
                "        if not self._await_words(self._own.combine_wait, step, self.deadline_s):\n"
                "            return None\n",
                "        self._await_words(self._own.combine_wait, step, self.deadline_s)\n",
            ),
            (_ENGINE, "return outputs if self._open_group().status == CLEAN else None", "return outputs"),
        ),
        seed=7,
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
        "lost-tokens-are-neither-repeated-nor-asked-for",
        (
            (
                _DELIVERY,
                "    self._news.add(known, len(known.ids) - 1, at_once=True)\n            kept_s",
                "    pass\n            kept_s",
            ),
            (_LIFECYCLE, "return self._ask_decode(now)\n\n    def _fail_late", "return []\n\n    def _fail_late"),
        ),
        seed=1,
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
        "kv-that-was-not-announced-for-this-attempt",
        (
            (_DELIVERY, "if known is None or known.announce.attempt < handoff.attempt:", "if known is None:"),
            (_DELIVERY, "if known.announce.attempt > handoff.attempt or known", "if known"),
            (_DELIVERY, "if message.num_tokens != num_tokens or (frames and not", "if (frames and not"),
        ),
        num_seeds=0,
        by_test="tests/unit/decode/test_prompt_arrival.py",
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
        "experts-not-loaded-on-a-switch-in-band",
        ((_RANK, "        return [LoadExperts(view), Adopt(view, in_band)]", "        return [Adopt(view, in_band)]"),),
        num_seeds=2000,
        seed=0,
    ),
    Mutant(
        "a-late-monitor-trusts-its-timers",
        (("services/monitor/ticks.py", "min(now, self._last_tick) - max(since, self._restarted_at)", "now - since"),),
        seed=14,
        plot="monitor",
    ),
    Mutant(
        "kv-blocks-freed-twice",
        (
            (
                "common/kv_blocks.py",
                "self._free += reversed(self._tables.pop(owner, ()))",
                "self._free += reversed(self._tables.get(owner, ())) if owner in self._tables else ()",
            ),
        ),
        num_seeds=50,
        seed=0,
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
        "a-view-is-neither-mapped-nor-forwarded",
        ((_RANK, "[*actions, ForwardView(view, endpoints), MapHeaps(view)]", "[*actions]"),),
        by_test="tests/unit/decode/test_membership.py",
    ),
    Mutant(
        "a-member-is-ready-before-the-newcomer",
        (
            (
                _RANK,
                "        if preparation is None or not preparation.mapped or preparation.ready:\n"
                "            return None\n",
                "        if preparation is None or preparation.ready:\n"
                "            return None\n"
                "        if self.state is not RankState.JOINING:\n"
                "            return preparation.view.epoch, ()\n",
            ),
        ),
        seed=0,
    ),
    Mutant(
        "rows-shared-between-sources",
        (
            (_REFERENCE, ".combine_rows[self.rank][place_N[begin:end]]", ".combine_rows[0][place_N[begin:end]]"),
            (
                "kernels/own_tokens.py",
                "self._place_MK[: len(rank_TK)] + rank_TK.astype(np.int64) * self._place_MK.size",
                "self._place_MK[: len(rank_TK)] + 0 * rank_TK.astype(np.int64)",
            ),
        ),
        num_seeds=0,
        by_test="tests/kernels/test_ep_epochs.py::test_a_zombie_stopped_in_a_combine_store_overwrites_no_row_of_its_successor",
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
        "who-was-missing-at-a-roll-call-is-not-told",
        (
            (
                "services/decode/rounds.py",
                "return group.unheard or tuple(",
                "return tuple(",
            ),
        ),
        seed=29,
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
        "kv-taken-before-all-pieces-are-there",
        (
            (
                "services/decode/kv_pieces.py",
                "        return all(self._covers(layer) for layer in range(self._num_layers))",
                "        return bool(self._pieces)",
            ),
        ),
        seed=2,
    ),
    Mutant(
        "no-header-barrier",
        (
            (
                _HEADERS,
                "        if not self._await_words(self._own.header_wait[due.bank], due.step, deadline_s, self._stop):\n"
                "            return None\n",
                "",
            ),
            (
                _HEADERS,
                "        if (rows >> _HIGH_HALF != header_tag(due.step)).any():\n"
                "            self._void(VoidReason.FUTURE_WORD)\n            return None\n",
                "",
            ),
        ),
        seed=0,
    ),
    # Rules without which the protocol's models found no wrong token: others hold in their place, or windows are narrow.
    Mutant(
        "no-poison",
        (
            (_WAIT, "elif fault is None and any(poison[member] >= floor for member in members):", "elif False:"),
            (_WAIT, "elif poison[self._rank] >= floor:", "elif False:"),
        ),
        num_seeds=100,
        by_test="tests/kernels/test_ep_epochs.py",
    ),
    Mutant(
        "no-poison-by-who-leaves",
        (
            (
                "kernels/epoch_state.py",
                "        if not in_band:\n            self._poison_peers()\n",
                "",
            ),
        ),
        num_seeds=100,
        by_test="tests/kernels/test_ep_epochs.py",
    ),
    Mutant(
        "a-word-from-the-future-is-waited-out",
        ((_WAIT, "future |= word > step", "future |= False"),),
        num_seeds=100,
        by_test="tests/kernels/test_ep_waits.py",
    ),
    Mutant(
        "no-digest",
        ((_HEADERS, "if len({row[0] for row in data_by_member}) > 1:", "if False:"),),
        num_seeds=100,
        by_test="tests/kernels/test_ep_waits.py",
    ),
    Mutant(
        "no-tags-in-headers",
        ((_HEADERS, "if (rows >> _HIGH_HALF != header_tag(due.step)).any():", "if False:"),),
        num_seeds=100,
        by_test="tests/kernels/test_ep_waits.py",
    ),
    Mutant(
        "staged-experts-overwrite-rows-in-use",
        (
            (
                "services/decode/expert_slots.py",
                "        used |= serving if spare_present else set()\n",
                "",
            ),
        ),
        num_seeds=100,
        by_test="tests/unit/decode/test_staging.py",
    ),
    Mutant(
        "tokens-kept-back-while-others-are-awaited",
        ((_WAIT, "            self.while_waiting()\n", ""),),
        seed=11,
        plot="stops",
    ),
    Mutant(
        "an-end-leaves-earlier-tokens-behind",
        (
            (
                "services/decode/news.py",
                "untold[id] = (request, min(start, before[1]) if before else start)",
                "untold[id] = (request, start)",
            ),
        ),
        num_seeds=0,
        by_test="tests/unit/decode/test_news.py",
    ),
    Mutant(
        "no-tags-on-expert-slots",
        (
            (
                "services/decode/expert_slots.py",
                "        self.rows.clear(row)\n        return row",
                "        return row",
            ),
        ),
        num_seeds=100,
        by_test="tests/unit/decode/test_expert_slots.py",
    ),
    Mutant(
        "the-first-header-in-no-bank-of-its-own",
        (
            (
                "kernels/step_words.py",
                "    return 2 + (epoch & 1) if ordinal == 0 else ordinal & 1",
                "    return ordinal & 1",
            ),
        ),
        num_seeds=100,
        by_test="tests/kernels/test_ep_epochs.py",
    ),
)
# Caught within the first stories: for every test run.
QUICK = (
    "commit-before-the-status-word",
    "doubled-tokens-are-taken",
    "a-gap-is-not-seen",
)
