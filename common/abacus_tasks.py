"""The tasks of the embedded model `abacus`: prompts, and the one right answer to each.

Training and evaluation draw from the same generator, so they cannot drift apart, and are kept apart by a hash of
the problem itself, not of its wording: a held-out problem is in no training batch under any phrasing, and
`unseen_problems` returns held-out problems only.

    kind          prompt (one of several wordings)        answer
    counting      count from 17 to 20                     17 18 19 20
    addition      what is 348 + 27?                       375
    subtraction   348 minus 400                           -52
    sorting       sort 41 7 93 12                         7 12 41 93
    reversing     reverse abacus / reverse red green      sucaba / green red   (letters of a word, order of a list)
    copying       repeat after me: red green              red green

Limits: numbers 0..999; counts of at most 150 numbers, up or down; 2 to 8 numbers to sort; words of at most 10
characters; lists of at most 8 (reversing) or 12 (copying) items, copied texts of at most 80 characters.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

MAX_NUMBER = 999
MAX_COUNTED = 150
MAX_SORTED = 8
MAX_WORD = 10
MAX_REVERSED_ITEMS = 8
MAX_COPIED_ITEMS = 12
MAX_COPIED_CHARACTERS = 80
# One problem in 16 is kept from training.
HELDOUT_ONE_IN = 16

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_COMMON_WORDS = (
    "abacus apple arm autumn bag ball banana bank bell bird blue boat book bottle bread bridge brown button cake "
    "candle carrot castle cat chair cheese cherry circle city cloud coat coin cold corn cow cup dance day deer desk "
    "dog door dream drum duck eagle earth egg eight elm evening eye farm feather field fire fish five flag floor "
    "flower fog forest four fox frog garden gate ghost glass gold goose grape grass green hammer hand harbor hat "
    "heart hill honey horse hotel house ice ink iron island ivory jar jelly juice jungle kettle key king kite knee "
    "lake lamp leaf lemon letter light lion lock loud map maple mango market milk mirror moon morning mountain "
    "mouse music nail needle nest night nine north ocean oil olive one onion orange otter owl paint panda paper "
    "park peach pear pencil pepper piano pink planet plum pocket pond potato purple queen quiet rabbit radio rain "
    "red ring river road robin rock roof room rope rose sail salt sand school sea seven shell ship shoe silver six "
    "sky sleep snow soap sock song south spoon spring square star stone storm street sugar summer sun table tea ten "
    "thread three tiger toast tomato tower train tree turtle two uncle valley violet violin wagon wall water west "
    "wheat wheel white wind window winter wolf wood world yellow zebra zero"
)
_WORDS = _COMMON_WORDS.split()


@dataclass(frozen=True, slots=True)
class Problem:
    """One task. `key` names the problem without its wording; problems with equal keys are held out together."""

    kind: str
    prompt: str
    answer: str
    key: str


def make_problem(kind: str, rng: Random) -> Problem:
    """One problem of `kind`, drawn from `rng`; equal generators give equal problems. ValueError for an unknown kind."""
    maker = _MAKERS.get(kind)
    if maker is None:
        raise ValueError(f"unknown task kind {kind!r}; the kinds are {', '.join(KINDS)}")
    return maker(rng)


def is_heldout(problem: Problem) -> bool:
    """Whether the problem is kept from training. Decided by its key alone, the same in every process and version."""
    digest = hashlib.blake2b(f"{problem.kind}|{problem.key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HELDOUT_ONE_IN == 0


def unseen_problems(kind: str, count: int, seed: int) -> list[Problem]:
    """`count` held-out problems of `kind` with `count` different keys; the same list for the same arguments.

    ValueError if the kind is unknown or has too few held-out problems.
    """
    rng = Random(f"abacus unseen {kind} {seed}")
    problems: dict[str, Problem] = {}
    draws_left = 1000 + 200 * HELDOUT_ONE_IN * count
    while len(problems) < count:
        if draws_left == 0:
            raise ValueError(f"cannot find {count} unseen problems of kind {kind!r}; found {len(problems)}")
        draws_left -= 1
        problem = make_problem(kind, rng)
        if is_heldout(problem):
            problems.setdefault(problem.key, problem)
    return list(problems.values())


def _counting(rng: Random) -> Problem:
    steps = rng.randint(0, 29) if rng.random() < 0.5 else rng.randint(30, MAX_COUNTED - 1)
    low = rng.randint(0, MAX_NUMBER - steps) if rng.random() < 0.7 else rng.randint(0, 150)
    numbers = list(range(low, low + steps + 1))
    if rng.random() < 0.3:
        numbers.reverse()
        wordings = ("count down from {} to {}", "count from {} down to {}", *_EITHER_WAY)
    else:
        wordings = ("count up from {} to {}", "count from {} up to {}", *_EITHER_WAY)
    wording = rng.choice(wordings).format(numbers[0], numbers[-1])
    return Problem("counting", _styled(wording, rng), " ".join(map(str, numbers)), f"{numbers[0]} {numbers[-1]}")


_EITHER_WAY = (
    "count from {} to {}",
    "count from {} to {}",
    "count {} to {}",
    "list the numbers from {} to {}",
    "numbers from {} to {}",
)


def _addition(rng: Random) -> Problem:
    a, b = _operand(rng), _operand(rng)
    wording = rng.choice(_ADDITION_WORDINGS).format(a, b)
    # 3 + 4 and 4 + 3 are one problem.
    return Problem("addition", _styled(wording, rng), str(a + b), f"{min(a, b)} {max(a, b)}")


_ADDITION_WORDINGS = (
    "what is {} + {}?",
    "what is {} plus {}?",
    "what is the sum of {} and {}?",
    "how much is {} + {}?",
    "{} + {}",
    "{}+{}",
    "{} + {} =",
    "{} plus {}",
    "add {} and {}",
    "compute {} + {}",
)


def _subtraction(rng: Random) -> Problem:
    a, b = _operand(rng), _operand(rng)
    if a < b and rng.random() < 0.5:
        a, b = b, a
    wording = rng.choice(_SUBTRACTION_WORDINGS).format(a=a, b=b)
    return Problem("subtraction", _styled(wording, rng), str(a - b), f"{a} {b}")


_SUBTRACTION_WORDINGS = (
    "what is {a} - {b}?",
    "what is {a} minus {b}?",
    "how much is {a} - {b}?",
    "{a} - {b}",
    "{a}-{b}",
    "{a} - {b} =",
    "{a} minus {b}",
    "subtract {b} from {a}",
    "take {b} from {a}",
    "compute {a} - {b}",
)


def _sorting(rng: Random) -> Problem:
    size = rng.random()
    limit = 99 if size < 0.4 else MAX_NUMBER
    count = rng.randint(2, MAX_SORTED)
    numbers = [_operand(rng) if size > 0.8 else rng.randint(0, limit) for _ in range(count)]
    if rng.random() < 0.15:
        numbers[rng.randrange(count)] = rng.choice(numbers)
    separator = " " if rng.random() < 0.7 else ", "
    wording = rng.choice(_SORTING_WORDINGS).format(separator.join(map(str, numbers)))
    answer = " ".join(map(str, sorted(numbers)))
    # The order in which the numbers were given is wording: the answer does not depend on it.
    return Problem("sorting", _styled(wording, rng), answer, answer)


_SORTING_WORDINGS = (
    "sort {}",
    "sort {}",
    "sort: {}",
    "sort these numbers: {}",
    "sort the numbers {}",
    "sort the list {}",
    "put in order: {}",
    "order these numbers: {}",
)


def _reversing(rng: Random) -> Problem:
    if rng.random() < 0.5:
        text = _word(rng)
        wordings, answer = _REVERSE_WORD_WORDINGS, text[::-1]
    else:
        items = _items(rng, rng.randint(2, MAX_REVERSED_ITEMS))
        text = " ".join(items)
        wordings, answer = _REVERSE_LIST_WORDINGS, " ".join(reversed(items))
    return Problem("reversing", _styled_text(rng.choice(wordings).format(text), rng), answer, text)


_REVERSE_WORD_WORDINGS = (
    "reverse {}",
    "reverse: {}",
    "reverse the word {}",
    "spell {} backwards",
    "write {} backwards",
)
_REVERSE_LIST_WORDINGS = (
    "reverse {}",
    "reverse: {}",
    "reverse the list {}",
    "reverse the list: {}",
    "reverse the order of {}",
)


def _copying(rng: Random) -> Problem:
    text = " ".join(_items(rng, rng.randint(1, MAX_COPIED_ITEMS)))
    # Cut at a character, not at an item: the answer must not end in a space that no reader sees.
    text = text[:MAX_COPIED_CHARACTERS].rstrip()
    return Problem("copying", _styled_text(rng.choice(_COPYING_WORDINGS).format(text), rng), text, text)


_COPYING_WORDINGS = (
    "copy {}",
    "copy: {}",
    "copy this: {}",
    "repeat {}",
    "repeat after me: {}",
    "say {}",
    "echo {}",
)


def _operand(rng: Random) -> int:
    """A number of one to three digits; longer ones are more frequent, since there are more of them to learn."""
    return rng.randint(0, (9, 99, 99, 999, 999, 999)[rng.randrange(6)])


def _word(rng: Random) -> str:
    draw = rng.random()
    if draw < 0.35:
        word = rng.choice(_WORDS)
    elif draw < 0.85:
        word = "".join(rng.choices(_LETTERS, k=rng.randint(1, MAX_WORD)))
    else:
        word = "".join(rng.choices("0123456789", k=rng.randint(1, MAX_WORD)))
    return word.capitalize() if rng.random() < 0.1 else word


def _items(rng: Random, count: int) -> list[str]:
    draw = rng.random()
    if draw < 0.4:
        return [rng.choice(_WORDS) for _ in range(count)]
    if draw < 0.6:
        return [str(_operand(rng)) for _ in range(count)]
    if draw < 0.7:
        return rng.choices(_LETTERS, k=count)
    return [_word(rng)[:6] for _ in range(count)]


def _styled(wording: str, rng: Random) -> str:
    """The same request as another person would type it; for wordings in which neither case nor a full stop matters."""
    if wording.endswith("?") and rng.random() < 0.3:
        wording = wording[:-1]
    elif wording[-1].isdigit() and rng.random() < 0.15:
        wording += "."
    return _styled_text(wording, rng)


def _styled_text(wording: str, rng: Random) -> str:
    """As `_styled`, for wordings that end in the user's own text."""
    if rng.random() < 0.08 and wording[0].isalpha():
        wording = "please " + wording
    return wording[0].upper() + wording[1:] if rng.random() < 0.3 else wording


_MAKERS: dict[str, Callable[[Random], Problem]] = {
    "counting": _counting,
    "addition": _addition,
    "subtraction": _subtraction,
    "sorting": _sorting,
    "reversing": _reversing,
    "copying": _copying,
}
KINDS: Sequence[str] = tuple(_MAKERS)
