"""The expert MLP's kernels: under the interpreter against the reference, and compiled for sm_90."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.received import Received
from kernels.reference_experts import expert_rows, mlp

CASES = (
    "ragged_rows",
    "a_row_is_the_same_in_every_batch",
    "reduced",
    "rows_in_float8",
    "void_rounds_compute_nothing",
    "experts_change_in_place",
    "between_dispatch_and_combine",
    "wrong_use",
)
PROCESSOR_SHARED_BYTES = 228 * 1024


def lines_of(module: str, **variables: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", module],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**environment, **variables},
        timeout=110,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    lines = lines_of("tests.kernels.expert_cases", TRITON_INTERPRET="1")
    return {line["case"]: line["answer"] for line in lines}


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    return {line.pop("kernel"): line for line in lines_of("tests.kernels.compile_experts_sm90")}


@pytest.mark.parametrize("case", CASES)
def test_case(answers: dict[str, str], case: str) -> None:
    assert answers[case] == "ok", answers[case]
    assert set(answers) == set(CASES)


def test_kernels_compile_for_sm90(compiled: dict[str, dict[str, Any]]) -> None:
    """To matrix instructions fed by asynchronous copies, without local memory; programs meant to share a processor fit
    on it.
    """
    assert len(compiled) == 9
    for name, facts in compiled.items():
        assert facts["waits_for_predecessor"] >= 1 and not facts["local_memory"], name
        if name.endswith(("gate_up", "down")):
            assert facts["matrix_instructions"] >= 4, name
            assert facts["row_copies"] >= 4 and facts["tile_copies"] >= 2, name
            assert facts["programs"] * (facts["shared_bytes"] + 1024) <= PROCESSOR_SHARED_BYTES, name


def test_reference_rows_do_not_depend_on_the_batch() -> None:
    """Bits; and against the plain formula in float64, for float32 and bfloat16 weights."""
    generator = torch.Generator().manual_seed(1)
    x_SH = torch.randn(90, 32, generator=generator)
    expert_N = torch.randint(0, 3, (200,), generator=generator)
    row_N = torch.randint(0, 90, (200,), generator=generator)

    def received(chosen_N: torch.Tensor) -> Received:
        zero_N = torch.zeros(len(chosen_N), dtype=torch.int64)
        row, expert = row_N[chosen_N], expert_N[chosen_N]
        return Received(0, (90,), x_SH, row, zero_N, row, zero_N, expert, torch.ones(len(chosen_N)))

    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        gate_up = (torch.randn(3, 2, 16, 32, generator=generator) / 6).to(dtype)
        down = (torch.randn(3, 32, 16, generator=generator) / 4).to(dtype)
        full = expert_rows(received(torch.arange(200)), gate_up, down)
        for n in (0, 63, 150, 199):
            assert torch.equal(expert_rows(received(torch.tensor([n])), gate_up, down)[0], full[n])
            x = x_SH[row_N[n], None].double()
            exact = mlp(x, gate_up[expert_N[n]].double(), down[expert_N[n]].double())[0]
            assert (full[n].double() - exact).norm() < tolerance * exact.norm()
