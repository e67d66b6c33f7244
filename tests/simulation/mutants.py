"""Rules taken out of the shipped files, one at a time: a checker that catches none of these proves nothing.

``python -m tests.simulation.mutants [NAME ...]`` runs them; each is an edit of a copy of the package.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.simulation.mutant import Edit, Mutant
from tests.simulation.mutant_list import MUTANTS

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("common", "kernels", "services", "tests/simulation")


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


def catch(mutant: Mutant) -> str:
    """What the checker said, with the seed, or which test failed; "" when nothing noticed. What caught it before comes
    first, so that all mutants take minutes; a search is needed only where that does not catch it any more."""
    with tempfile.TemporaryDirectory(prefix="regrow-mutant-") as directory:
        tree = Path(directory)
        apply(mutant, tree)
        caught = _catch_by_stories(mutant, tree, mutant.seed, mutant.seed) if mutant.seed is not None else ""
        if not caught and mutant.by_test:
            caught = _catch_by_test(mutant, tree)
        if not caught and mutant.num_seeds:
            caught = _catch_by_stories(mutant, tree, 0, mutant.num_seeds - 1)
        return caught


def _catch_by_stories(mutant: Mutant, tree: Path, first: int, last: int) -> str:
    plot = ("--plot", mutant.plot) if mutant.plot else ()
    done = _python(tree, "-m", "tests.simulation.run", str(first), "--to", str(last), "--quiet", *plot)
    if done.returncode not in (0, 1) or not done.stdout:
        raise RuntimeError(f"mutant {mutant.name} does not run: {done.stderr[-2000:]}")
    caught = next((line for line in done.stdout.splitlines() if line.startswith("seed ")), "")
    if caught and _python(ROOT, "-m", "tests.simulation.run", caught.split()[1], "--quiet", *plot).returncode:
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
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    num_missed = 0
    for mutant in chosen:
        caught = catch(mutant)
        num_missed += not caught
        print(f"{mutant.name:50s} {caught or 'NOT CAUGHT'}", flush=True)
    print(f"{len(chosen) - num_missed} of {len(chosen)} mutants caught")
    return 1 if num_missed else 0


if __name__ == "__main__":
    sys.exit(main())
