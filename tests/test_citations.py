"""What code and documentation cite is there: rules of docs/protocol.md, and files of this repository."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROTOCOL = ROOT / "docs" / "protocol.md"
FOLDERS = ("benchmarks", "common", "compose", "docs", "examples", "kernels", "services", "tests", "training")
# Records tell of their own time: files may have been renamed since.
RECORDS = ("docs/decisions", "benchmarks/results")
ENDINGS = (".py", ".md", ".toml", ".yml", ".yaml", ".c", ".h")

_CITATION = re.compile(r"PROTOCOL(?:'s)?\s+(?:sections?\s+)?((?:\d+(?:\.\d+)?(?:,\s+|\s+to\s+|\s+and\s+)?)+)")
_PATH = re.compile(r"`((?:%s)/[\w./-]+)`" % "|".join(FOLDERS))  # noqa: UP031 - braces of the pattern


def sources() -> Iterator[Path]:
    yield from (path for path in ROOT.iterdir() if path.suffix in ENDINGS or path.name == "Makefile")
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            place = path.relative_to(ROOT).as_posix()
            if path.suffix in ENDINGS and path != Path(__file__) and not place.startswith(RECORDS):
                yield path


def rules(text: str) -> set[str]:
    """Numbers of sections, and of the rules in them."""
    found: set[str] = set()
    section = ""
    for line in text.splitlines():
        if heading := re.match(r"## (?:(\d+)\. )?", line):
            section = heading.group(1) or ""
            found |= {section} - {""}
        elif section and (rule := re.match(r"(\d+)\. ", line)):
            found.add(f"{section}.{rule.group(1)}")
    return found


def citations(text: str) -> list[str]:
    """All numbers that follow the word; a line may break between them, in a comment too."""
    joined = re.sub(r"\n\s*#?\s*", " ", text)
    return [number for match in _CITATION.finditer(joined) for number in re.findall(r"\d+(?:\.\d+)?", match.group(1))]


def test_every_rule_that_is_cited_is_there() -> None:
    known = rules(PROTOCOL.read_text())
    cited = [(path, number) for path in sources() for number in citations(path.read_text())]
    assert len(cited) > 40, "the test looks in the wrong place"
    wrong = {f"{path.relative_to(ROOT)}: PROTOCOL {number}" for path, number in cited if number not in known}
    assert not wrong


def test_nothing_cites_what_is_not_in_the_repository() -> None:
    named = {str(path.relative_to(ROOT)) for path in sources() if re.search(r"\bDESIGN\b", path.read_text())}
    assert not named, "cite a page of docs/"


def test_every_file_that_is_named_is_there() -> None:
    missing = {
        f"{path.relative_to(ROOT)}: {named}"
        for path in sources()
        for named in _PATH.findall(path.read_text())
        if not (ROOT / named).exists() and not (ROOT / f"{named}.py").exists()
    }
    assert not missing


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("(PROTOCOL 3.2)", ["3.2"]),
        ("PROTOCOL 3.3, 3.4)", ["3.3", "3.4"]),
        ("PROTOCOL 1.1, 2.1 to 2.3; more", ["1.1", "2.1", "2.3"]),
        ("# by PROTOCOL\n    # sections 1 and 2.", ["1", "2"]),
        ("no PROTOCOL here, 3 of them", []),
    ],
)
def test_what_a_citation_is(text: str, numbers: list[str]) -> None:
    assert citations(text) == numbers
    assert rules("## 1. A\n1. x\n2. y\n## B\n1. z\n") == {"1", "1.1", "1.2"}
