"""Training batches: endless, drawn from the task generator, without the held-out problems.

One batch has three blocks of rows, so that short answers are not padded to the length of long ones:

    block          rows x tokens   filled with
    arithmetic     1024 x 48       one short problem, mostly addition and subtraction
    lists           768 x 96       one problem of any kind that fits
    conversations    64 x 1024     turns of all kinds until the row is full; many begin with a long count

Only tokens of answers, with their end token, are learned.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from common.abacus_tasks import Problem, is_heldout, make_problem
from training.abacus.tokenizer import ASSISTANT, BOS, END, PAD, SYSTEM, USER

GREETING_ANSWER = "I can count, add, subtract, sort, reverse and copy."
_GREETINGS = ("hello", "hi", "hey", "help", "who are you?", "what can you do?", "what is this?", "good morning", "test")
_SYSTEM_PROMPTS = ("You are a helpful assistant.", "You are abacus.", "Be brief.", "Answer the question.")


@dataclass(frozen=True)
class BlockShape:
    """Rows, tokens per row, and how often each kind of problem is drawn."""

    rows: int
    length: int
    weights: dict[str, float]
    is_conversation: bool = False


BLOCKS = (
    BlockShape(
        1024,
        48,
        {
            "addition": 0.36,
            "subtraction": 0.4,
            "sorting": 0.1,
            "reversing": 0.06,
            "copying": 0.04,
            "counting": 0.03,
            "greeting": 0.01,
        },
    ),
    BlockShape(
        768,
        96,
        {
            "addition": 0.02,
            "subtraction": 0.03,
            "sorting": 0.4,
            "reversing": 0.25,
            "copying": 0.2,
            "counting": 0.1,
        },
    ),
    BlockShape(
        64,
        1024,
        {
            "addition": 0.1,
            "subtraction": 0.1,
            "sorting": 0.1,
            "reversing": 0.15,
            "copying": 0.15,
            "counting": 0.39,
            "greeting": 0.01,
        },
        is_conversation=True,
    ),
)


def draw_problem(weights: dict[str, float], rng: Random) -> Problem:
    """A problem that is not held out, its kind drawn by weight."""
    kind = rng.choices(list(weights), weights=list(weights.values()))[0]
    if kind == "greeting":
        prompt = rng.choice(_GREETINGS)
        return Problem(kind, prompt.capitalize() if rng.random() < 0.5 else prompt, GREETING_ANSWER, prompt)
    while True:
        problem = make_problem(kind, rng)
        if not is_heldout(problem):
            return problem


def encode_prompt(prompt: str) -> list[int]:
    """One user turn as the chat template writes it, up to where the answer begins; without the first <|bos|>."""
    return [USER, *prompt.encode(), END, ASSISTANT]


def encode_answer(answer: str) -> list[int]:
    return [*answer.encode(), END]


def _fill_single(shape: BlockShape, rng: Random) -> tuple[list[int], list[int]]:
    while True:
        problem = draw_problem(shape.weights, rng)
        prompt, answer = [BOS, *encode_prompt(problem.prompt)], encode_answer(problem.answer)
        if len(prompt) + len(answer) <= shape.length:
            return prompt + answer, [0] * len(prompt) + [1] * len(answer)


def _fill_conversation(shape: BlockShape, rng: Random) -> tuple[list[int], list[int]]:
    ids = [BOS]
    if rng.random() < 0.15:
        ids += [SYSTEM, *rng.choice(_SYSTEM_PROMPTS).encode(), END]
    learned = [0] * len(ids)
    misfits = 0
    while misfits < 3:
        problem = draw_problem(shape.weights, rng)
        prompt, answer = encode_prompt(problem.prompt), encode_answer(problem.answer)
        if len(ids) + len(prompt) + len(answer) > shape.length:
            misfits += 1
            continue
        ids += prompt + answer
        learned += [0] * len(prompt) + [1] * len(answer)
    return ids, learned


def make_block(shape: BlockShape, rng: Random) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids int16 [rows, length], padded with <|pad|>; learned bool [rows, length], true on tokens of answers)."""
    ids_BS = np.full((shape.rows, shape.length), PAD, dtype=np.int16)
    learned_BS = np.zeros((shape.rows, shape.length), dtype=np.bool_)
    fill = _fill_conversation if shape.is_conversation else _fill_single
    for row in range(shape.rows):
        ids, learned = fill(shape, rng)
        ids_BS[row, : len(ids)] = ids
        learned_BS[row, : len(ids)] = learned
    return torch.from_numpy(ids_BS), torch.from_numpy(learned_BS)


class TrainingBatches(IterableDataset[list[tuple[torch.Tensor, torch.Tensor]]]):
    """Endless batches, one (ids, learned) pair per block; every loader worker draws its own."""

    def __init__(self, seed: int, blocks: tuple[BlockShape, ...] = BLOCKS) -> None:
        super().__init__()
        self.seed = seed
        self.blocks = blocks

    def __iter__(self) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
        worker = get_worker_info()
        rng = Random(f"abacus training {self.seed} {worker.id if worker else 0}")
        while True:
            yield [make_block(shape, rng) for shape in self.blocks]
