"""The rules that are taken out of the shipped files, one at a time."""

from tests.simulation.mutants_of_ranks import RANK_MUTANTS
from tests.simulation.mutants_of_services import SERVICE_MUTANTS

MUTANTS = (*RANK_MUTANTS, *SERVICE_MUTANTS)
# Caught within the first stories: for every test run.
QUICK = (
    "commit-before-the-status-word",
    "doubled-tokens-are-taken",
    "a-gap-is-not-seen",
)
