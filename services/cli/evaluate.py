"""``regrow eval``: the tasks of the embedded model against a running server, greedily, answers compared exactly."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from rich.console import Console
from rich.table import Table

from common.abacus_tasks import KINDS, Problem, unseen_problems
from common.monitor_address import MonitorAddress
from common.service_runner import OperatorError
from services.cli.chat_client import Stream, model_name, new_session, run_streams
from services.cli.kill_loop import KillLoop

# Longer than any right answer: counting 150 numbers of three digits.
_MAX_TOKENS = 900
_SECONDS_PER_PROBLEM = 10.0


@dataclass(frozen=True, slots=True)
class EvalOptions:
    url: str
    count: int  # of each kind
    kinds: tuple[str, ...]  # empty = all
    concurrency: int
    seed: int
    threshold: float
    output: Path | None
    kill_every_s: float = 0.0  # 0 = never
    bus: MonitorAddress | None = None  # where to ask for kills


def evaluate(options: EvalOptions) -> int:
    """Returns 1 when a kind is below the threshold or a request failed; with kills, when an answer differs from the
    one to the same problem without them."""
    kinds = options.kinds or tuple(KINDS)
    problems = [problem for kind in kinds for problem in unseen_problems(kind, options.count, options.seed)]
    streams = asyncio.run(_ask(options, problems, None))
    code = _report(kinds, problems, streams, options.threshold)
    if options.kill_every_s and options.bus is not None:
        kills, calm = KillLoop(options.url, options.bus, options.kill_every_s), streams
        streams = asyncio.run(_ask(options, problems, kills))
        code = max(code, _report(kinds, problems, streams, options.threshold), _compare(problems, calm, streams, kills))
    if options.output is not None:
        options.output.write_text(json.dumps([_record(p, s) for p, s in zip(problems, streams, strict=True)], indent=1))
    return code


def _compare(problems: Sequence[Problem], calm: Sequence[Stream], killed: Sequence[Stream], kills: KillLoop) -> int:
    """Answer by answer: the same share of right ones could be of other problems."""
    pairs = list(zip(problems, calm, killed, strict=True))
    differing = [
        (problem, before, after)
        for problem, before, after in pairs
        if after.error or (before.text, before.finish) != (after.text, after.finish)
    ]
    num_equal = len(pairs) - len(differing)
    print(f"{kills.num_killed} ranks killed; {num_equal} of {len(pairs)} answers equal those without kills")
    for problem, before, after in differing[:5]:
        print(f"{problem.prompt!r}: {before.text[:80]!r} without kills, {(after.error or after.text)[:80]!r} with them")
    for failure in kills.failures:
        print(failure)
    return 1 if differing or kills.failures or not kills.num_killed else 0


async def _ask(options: EvalOptions, problems: Sequence[Problem], kills: KillLoop | None) -> list[Stream]:
    deadline_s = 60.0 + _SECONDS_PER_PROBLEM * len(problems)
    try:
        async with new_session(30.0) as session:
            model = await model_name(session, options.url)
    except (aiohttp.ClientError, TimeoutError) as error:
        raise OperatorError(f"no server at {options.url}: {error}; start one with regrow up, or name --url") from None
    bodies = [
        {
            "model": model,
            "messages": [{"role": "user", "content": problem.prompt}],
            "temperature": 0,
            "max_tokens": _MAX_TOKENS,
        }
        for problem in problems
    ]
    streams = [Stream(body) for body in bodies]
    async with asyncio.TaskGroup() as group:
        group.create_task(run_streams(options.url, streams, options.concurrency, deadline_s))
        if kills is not None:
            group.create_task(kills.run(lambda: all(stream.is_over for stream in streams)))
    return streams


def _record(problem: Problem, stream: Stream) -> dict[str, str]:
    return {
        "kind": problem.kind,
        "prompt": problem.prompt,
        "expected": problem.answer,
        "answer": stream.text,
        "error": stream.error,
    }


def _report(kinds: Sequence[str], problems: Sequence[Problem], streams: Sequence[Stream], threshold: float) -> int:
    table = Table("kind", "problems", "right", "exact match", "failed requests")
    wrong: list[tuple[Problem, Stream]] = []
    is_enough = True
    for kind in kinds:
        pairs = [(p, s) for p, s in zip(problems, streams, strict=True) if p.kind == kind]
        missed = [(p, s) for p, s in pairs if s.error or s.text.strip() != p.answer]
        num_failed = sum(bool(s.error) for _, s in pairs)
        accuracy = 1 - len(missed) / len(pairs)
        is_enough &= accuracy >= threshold and not num_failed
        wrong += missed[:2]
        table.add_row(kind, str(len(pairs)), str(len(pairs) - len(missed)), f"{accuracy:.1%}", str(num_failed))
    console = Console()
    console.print(table)
    for problem, stream in wrong:
        got = stream.error or stream.text.strip()
        console.print(f"{problem.prompt!r}: expected {problem.answer[:80]!r}, got {got[:80]!r}", markup=False)
    console.print("passed" if is_enough else f"below the threshold of {threshold:.1%}")
    return 0 if is_enough else 1
