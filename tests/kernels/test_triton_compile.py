"""Every kernel compiles for sm_90, and to the instructions that the memory-order argument and the speed rest on."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_sm90"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=environment,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    facts = [json.loads(line) for line in done.stdout.splitlines()]
    return {fact.pop("kernel"): fact for fact in facts}


def test_all_kernels_compile(compiled: dict[str, dict[str, Any]]) -> None:
    forms = ("dispatch", "combine_ordered", "combine_reduced", "allgather")
    control = ("announce", "barrier", "poison")
    others = {f"{form}_alone" for form in forms} | {"dispatch_fp8", "dispatch_bare", "combine_ordered_bare"}
    assert set(compiled) == {*forms, *control, *others}
    assert all(fact["sass_bytes"] > 0 for fact in compiled.values())


def test_words_are_released_and_acquired_at_system_scope(compiled: dict[str, dict[str, Any]]) -> None:
    for name in ("dispatch", "combine_ordered", "combine_reduced", "allgather", "barrier"):
        assert compiled[name]["release_words"] >= 2, name  # the step word, and poison
        assert compiled[name]["acquire_loads"] >= 1, name


def test_rows_move_sixteen_bytes_at_a_time(compiled: dict[str, dict[str, Any]]) -> None:
    assert compiled["dispatch"]["wide_stores"] >= 2  # one for each of two ranks
    assert compiled["dispatch"]["wide_loads"] >= 1
    assert compiled["combine_ordered"]["wide_loads"] >= 16  # top-8, sent and added up
    assert compiled["combine_ordered"]["wide_stores"] >= 9
    assert compiled["combine_reduced"]["wide_loads"] >= 3
    assert compiled["dispatch_fp8"]["wide_loads"] >= 2
    assert compiled["dispatch_fp8"]["wide_stores"] >= 4  # of half as many bytes: two turns of sixteen a thread and rank


def test_what_the_bare_build_leaves_out(compiled: dict[str, dict[str, Any]]) -> None:
    for name in ("dispatch", "combine_ordered"):
        assert compiled[f"{name}_bare"]["sass_bytes"] < 0.8 * compiled[name]["sass_bytes"]
        assert compiled[f"{name}_bare"]["release_words"] < compiled[name]["release_words"], "no poison of waits"
