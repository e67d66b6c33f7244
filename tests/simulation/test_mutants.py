"""The checker can fail: rules taken out of the shipped files are missed. All of them by `make chaos-sim`."""

import pytest

from tests.simulation.mutant import Mutant
from tests.simulation.mutant_list import MUTANTS, QUICK
from tests.simulation.mutants import ROOT, catch, mutated


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_edit_still_fits_the_file(mutant: Mutant) -> None:
    for edit in mutant.edits:
        text = (ROOT / edit[0]).read_text()
        assert mutated(text, mutant, edit) != text


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.name in QUICK], ids=lambda mutant: mutant.name)
def test_the_checker_misses_the_rule(mutant: Mutant) -> None:
    assert "seed" in catch(mutant)
