"""How processes end: what an operator must mend is exit code 2 and one line, anything else a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_PROGRAM = """
import asyncio, sys
from common.service_runner import OperatorError, for_the_operator, run_service

async def serve(stop: asyncio.Event) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(fail())

async def fail() -> None:
    {body}

sys.exit(run_service("test", serve))
"""


@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        ("raise OperatorError('no such model')", 2, "regrow test: error: no such model"),
        ("\n    with for_the_operator():\n        int('x')", 2, "regrow test: error: invalid literal"),
        ("int('x')", 1, "ValueError: invalid literal"),
        ("pass", 0, ""),
    ],
)
def test_exit_codes(body: str, code: int, line: str) -> None:
    command = [sys.executable, "-c", _PROGRAM.replace("{body}", body)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert line in done.stderr and ("Traceback" in done.stderr) == (code == 1)
