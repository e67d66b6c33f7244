"""Rules taken out of the shipped files, one at a time: a checker that catches none of these proves nothing.

``python -m tests.simulation.mutants [NAME ...]`` runs them; each is an edit of a copy of the package.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("common", "kernels", "services", "tests/simulation")

Edit = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Mutant:
    """``edits``: (file, old text, new text); the old text stands there exactly once. ``num_seeds`` bound the search;
    ``by_test`` names the test that catches what no story here can show."""

    name: str
    edits: tuple[Edit, ...]
    num_seeds: int = 400
    by_test: str = ""


_WAIT = "kernels/word_wait.py"
_REFERENCE = "kernels/reference.py"
_ENGINE = "services/decode/rank_engine.py"
_DELIVERY = "services/decode/delivery.py"
_RANK = "services/decode/membership.py"
_MONITOR = "services/monitor/membership.py"
_GROUP = "services/monitor/group.py"
_LIFECYCLE = "services/router/request_lifecycle.py"

MUTANTS = (
    Mutant(
        "no-epoch-in-poison",
        ((_WAIT, "elif fault is None and any(poison[member] >= floor for member in members):", "elif any(poison):"),),
    ),
    Mutant(
        "verdict-by-accusation",
        (
            (
                _MONITOR,
                "        roll_call.answers[process] = accused\n",
                "        roll_call.answers[process] = accused\n"
                "        if guilty := [m.process for m in self._group.members if m.rank in accused]:\n"
                "            self.remove([Removal(g, 'accused', now) for g in guilty], now)\n"
                "            return\n",
            ),
        ),
    ),
    Mutant(
        "a-void-rank-publishes",
        (
            (
                _REFERENCE,
                "        if not self._await_words(self._own.dispatch_word, step, self.deadline_s):\n"
                "            return None\n",
                "        self._await_words(self._own.dispatch_word, step, self.deadline_s)\n",
            ),
            (
                _REFERENCE,
                "        if self.status == VOID:\n            return None\n        if received.step",
                "        if received.step",
            ),
        ),
    ),
    Mutant(
        "commit-before-the-status-word",
        (
            (
                _REFERENCE,
                "        if not self._await_words(self._own.combine_word, step, self.deadline_s):\n"
                "            return None\n",
                "        self._await_words(self._own.combine_word, step, self.deadline_s)\n",
            ),
            (_ENGINE, "return outputs if self._open_group().status == CLEAN else None", "return outputs"),
        ),
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
    ),
    Mutant(
        "lost-tokens-are-neither-repeated-nor-asked-for",
        (
            (
                _DELIVERY,
                "    self._tell(known, len(known.ids) - 1)\n            kept_s",
                "    pass\n            kept_s",
            ),
            (_LIFECYCLE, "return self._ask_decode(now)\n\n    def _fail_late", "return []\n\n    def _fail_late"),
        ),
    ),
    Mutant(
        "a-gap-is-not-seen",
        (
            (_LIFECYCLE, "        if tokens.start > have:\n            return self._ask_for_gap(now)\n", ""),
            (_LIFECYCLE, "new = tokens.ids[have - tokens.start :]", "new = tokens.ids[max(have - tokens.start, 0) :]"),
        ),
    ),
    Mutant(
        "doubled-tokens-are-taken",
        ((_LIFECYCLE, "new = tokens.ids[have - tokens.start :]", "new = tokens.ids"),),
    ),
    Mutant(
        "kv-that-was-not-announced-for-this-attempt",
        (
            (_DELIVERY, "if known is None or known.announce.attempt < handoff.attempt:", "if known is None:"),
            (_DELIVERY, "if known.announce.attempt > handoff.attempt or known", "if known"),
            (_DELIVERY, "if message.num_tokens != num_tokens or (frames and not", "if (frames and not"),
        ),
        by_test="tests/unit/decode/test_delivery.py",
    ),
    Mutant(
        "a-slot-given-out-before-its-process-is-gone",
        (
            (
                _MONITOR,
                "is Fate.FENCE:\n                self._slots.fence(slot, now, removal.evidence)\n",
                "is Fate.FENCE:\n                self._slots.free(slot, now, removal.evidence)\n",
            ),
        ),
    ),
    Mutant(
        "a-void-round-without-a-new-view",
        (
            (
                _MONITOR,
                "            self.publish_same_members(f",
                "            self.roll_call = None\n            (lambda *_: None)(f",
            ),
        ),
    ),
    Mutant(
        "experts-not-loaded-on-a-switch-in-band",
        ((_RANK, "        return [LoadExperts(view), Adopt(view, in_band)]", "        return [Adopt(view, in_band)]"),),
        num_seeds=2000,
    ),
    Mutant(
        "a-late-monitor-trusts-its-timers",
        (("services/monitor/ticks.py", "min(now, self._last_tick) - max(since, self._restarted_at)", "now - since"),),
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
    ),
    Mutant(
        "a-view-is-neither-mapped-nor-forwarded",
        ((_RANK, "[*actions, ForwardView(view, endpoints), MapHeaps(view)]", "[*actions]"),),
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
        by_test="tests/unit/monitor/test_takeover.py::test_numbers_of_which_nobody_was_heard_are_not_used_again",
    ),
)
# Nothing catches these yet: the story is too rare, or another rule (a process obeys one monitor in a term; a view must
# be adopted in time) holds in place of the one taken out. Run by name.
OPEN = (
    Mutant(
        "a-roll-call-forgives-silence",
        (
            (
                _MONITOR,
                "self.remove([Removal(process, evidence, roll_call.started_at) for process in roll_call.silent], now)",
                "self.publish_same_members(evidence, now)",
            ),
        ),
    ),
)
# Caught within the first stories: for every test run.
QUICK = (
    "commit-before-the-status-word",
    "doubled-tokens-are-taken",
    "a-gap-is-not-seen",
    "a-slot-given-out-before-its-process-is-gone",
)


def mutated(text: str, mutant: Mutant, edit: Edit) -> str:
    path, old, new = edit
    if text.count(old) != 1:
        raise ValueError(f"mutant {mutant.name}: {path} has {text.count(old)} places with the text {old!r}, not one")
    return text.replace(old, new)


def apply(mutant: Mutant, tree: Path) -> None:
    """A copy of the package in ``tree``, without the rule."""
    for package in _PACKAGES:
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tests" / "__init__.py", tree / "tests")
    for edit in mutant.edits:
        file = tree / edit[0]
        file.write_text(mutated(file.read_text(), mutant, edit))


def catch(mutant: Mutant, first_seed: int = 0) -> str:
    """What the checker said, with the seed; "" when it said nothing in ``num_seeds`` stories."""
    with tempfile.TemporaryDirectory(prefix="regrow-mutant-") as directory:
        tree = Path(directory)
        apply(mutant, tree)
        if mutant.by_test:
            return _catch_by_test(mutant, tree)
        last = first_seed + mutant.num_seeds - 1
        done = _python(tree, "-m", "tests.simulation.run", str(first_seed), "--to", str(last), "--quiet")
        if done.returncode not in (0, 1) or not done.stdout:
            raise RuntimeError(f"mutant {mutant.name} does not run: {done.stderr[-2000:]}")
        caught = next((line for line in done.stdout.splitlines() if line.startswith("seed ")), "")
        if caught and _python(ROOT, "-m", "tests.simulation.run", caught.split()[1], "--quiet").returncode:
            raise RuntimeError(f"{caught}: so it does without the mutant {mutant.name}")
        return caught


def _catch_by_test(mutant: Mutant, tree: Path) -> str:
    ignore = shutil.ignore_patterns("__pycache__", "simulation")
    shutil.copytree(ROOT / "tests", tree / "tests", ignore=ignore, dirs_exist_ok=True)
    shutil.copy(ROOT / "pyproject.toml", tree)
    done = _python(tree, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", mutant.by_test)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"mutant {mutant.name} does not run: {(done.stdout + done.stderr)[-2000:]}")
    return next((line for line in done.stdout.splitlines() if line.startswith("FAILED ")), "")


def _python(tree: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": str(tree)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.mutants", description=__doc__)
    parser.add_argument("names", nargs="*")
    names = parser.parse_args().names
    chosen = [mutant for mutant in (*MUTANTS, *OPEN) if mutant.name in (names or [m.name for m in MUTANTS])]
    num_missed = 0
    for mutant in chosen:
        caught = catch(mutant)
        num_missed += not caught
        print(f"{mutant.name:50s} {caught or f'NOT CAUGHT in {mutant.num_seeds} stories'}", flush=True)
    print(f"{len(chosen) - num_missed} of {len(chosen)} mutants caught")
    return 1 if num_missed else 0


if __name__ == "__main__":
    sys.exit(main())
