"""The task generator: right answers, checked by code that shares nothing with it, and a clean held-out split."""

import re
from random import Random

import pytest

from common import abacus_tasks
from common.abacus_tasks import KINDS, Problem, is_heldout, make_problem, unseen_problems
from training.abacus.batches import BLOCKS, draw_problem


def _numbers(text: str) -> list[int]:
    return [int(match) for match in re.findall(r"\d+", text)]


def _payload(prompt: str) -> str:
    """The user's own text in a wording for reversing or copying."""
    wording = re.compile(
        r"(please )?(reverse the (word|list|order of):?|reverse:?|spell|write"
        r"|copy this:|copy:?|repeat after me:|repeat|say|echo) ",
        re.IGNORECASE,
    )
    return wording.sub("", prompt, count=1).removesuffix(" backwards")


def _expected(problem: Problem) -> str:
    numbers, prompt = _numbers(problem.prompt), problem.prompt.lower()
    match problem.kind:
        case "counting":
            start, end = numbers
            step = 1 if end >= start else -1
            return " ".join(str(n) for n in range(start, end + step, step))
        case "addition":
            return str(sum(numbers))
        case "subtraction":
            a, b = reversed(numbers) if " from " in prompt else numbers
            return str(a - b)
        case "sorting":
            remaining, ordered = numbers, []
            while remaining:
                smallest = min(remaining)
                remaining.remove(smallest)
                ordered.append(str(smallest))
            return " ".join(ordered)
        case "reversing":
            words = _payload(problem.prompt).split(" ")
            return words[0][::-1] if len(words) == 1 else " ".join(words[::-1])
        case "copying":
            return _payload(problem.prompt)
        case unknown:
            raise AssertionError(f"no expectation for {unknown}")


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_right(kind: str) -> None:
    rng = Random(7)
    for _ in range(1500):
        problem = make_problem(kind, rng)
        assert problem.answer == _expected(problem), problem


@pytest.mark.parametrize("kind", KINDS)
def test_equal_generators_give_equal_problems(kind: str) -> None:
    first, second = Random(3), Random(3)
    assert [make_problem(kind, first) for _ in range(200)] == [make_problem(kind, second) for _ in range(200)]
    assert unseen_problems(kind, 20, seed=1) == unseen_problems(kind, 20, seed=1)
    assert unseen_problems(kind, 20, seed=1) != unseen_problems(kind, 20, seed=2)


@pytest.mark.parametrize("kind", KINDS)
def test_unseen_problems_are_distinct_and_never_in_training(kind: str) -> None:
    unseen = unseen_problems(kind, 300, seed=0)
    keys = {problem.key for problem in unseen}
    assert len(keys) == len(unseen) == 300
    assert all(is_heldout(problem) for problem in unseen)
    rng = Random(11)
    drawn = [draw_problem(block.weights, rng) for block in BLOCKS for _ in range(4000)]
    of_kind = [problem for problem in drawn if problem.kind == kind]
    assert len(of_kind) > 100
    assert not keys & {problem.key for problem in of_kind}


@pytest.mark.parametrize("kind", KINDS)
def test_one_problem_in_sixteen_is_held_out(kind: str) -> None:
    rng = Random(5)
    num_heldout = sum(is_heldout(make_problem(kind, rng)) for _ in range(8000))
    assert 300 < num_heldout < 700


def test_the_split_is_the_one_the_shipped_model_was_trained_with() -> None:
    """These decisions are frozen: with another hash, problems seen in training would count as unseen."""
    heldout = [("counting", "557 551"), ("addition", "8 34"), ("subtraction", "364 827"), ("reversing", "abacus")]
    seen = [("counting", "17 140"), ("addition", "27 348"), ("copying", "red green blue")]
    assert all(is_heldout(Problem(kind, "", "", key)) for kind, key in heldout)
    assert not any(is_heldout(Problem(kind, "", "", key)) for kind, key in seen)


def test_the_wording_does_not_decide_what_is_held_out() -> None:
    for kind in ("addition", "sorting"):
        rng = Random(2)
        by_operands: dict[tuple[int, ...], set[str]] = {}
        for _ in range(30000):
            problem = make_problem(kind, rng)
            by_operands.setdefault(tuple(sorted(_numbers(problem.prompt))), set()).add(problem.key)
        assert len(by_operands) < 30000
        assert all(len(keys) == 1 for keys in by_operands.values())


def test_long_counts_are_common_enough_to_show_a_fault_in_the_middle() -> None:
    lengths = [len(problem.answer) for problem in unseen_problems("counting", 200, seed=0)]
    assert sum(length >= 200 for length in lengths) > 60
    assert max(lengths) <= 4 * abacus_tasks.MAX_COUNTED


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown task kind 'division'; the kinds are counting, .*copying"):
        make_problem("division", Random(0))


def test_asking_for_more_unseen_problems_than_exist_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abacus_tasks, "is_heldout", lambda problem: problem.key == "1 2")
    with pytest.raises(ValueError, match="cannot find 2 unseen problems of kind 'addition'"):
        unseen_problems("addition", 2, seed=0)
