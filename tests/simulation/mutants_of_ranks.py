"""Rules of the ranks that are taken out: the data path, its kernels, what a rank keeps and tells."""

from tests.simulation.mutant import Mutant

_WAIT = "kernels/word_wait.py"
_REFERENCE = "kernels/reference.py"
_HEADERS = "kernels/header_exchange.py"
_ENGINE = "services/decode/rank_engine.py"
_DELIVERY = "services/decode/delivery.py"
_RANK = "services/decode/membership.py"
_LIFECYCLE = "services/router/request_lifecycle.py"

RANK_MUTANTS = (
    Mutant(
        "no-epoch-in-poison",
        ((_WAIT, "elif fault is None and any(poison[member] >= floor for member in members):", "elif any(poison):"),),
        seed=0,
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
        "experts-not-loaded-on-a-switch-in-band",
        ((_RANK, "        return [LoadExperts(view), Adopt(view, in_band)]", "        return [Adopt(view, in_band)]"),),
        num_seeds=2000,
        seed=0,
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
    Mutant(
        "tokens-kept-back-while-experts-are-loaded",
        (("services/decode/delivery.py", "        self._news.hurry_all()", "        pass"),),
        num_seeds=0,
        by_test="tests/services/test_told_in_time.py",
    ),
    Mutant(
        "tokens-kept-back-while-c-waits",
        (("kernels/compiled_wait.py", "            self.while_waiting()\n", ""),),
        num_seeds=0,
        by_test="tests/services/test_told_in_time.py::test_while_others_are_awaited",
    ),
)
