"""A rule that is taken out of the shipped files."""

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
