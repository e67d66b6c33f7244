"""A directory for heaps that must be empty again when the test ends."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.own_directory import own_directory_prefix


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def heap_dir() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix=own_directory_prefix(os.getpid()), dir="/dev/shm"))
    yield directory
    left = sorted(os.listdir(directory))
    for name in left:
        (directory / name).unlink()
    directory.rmdir()
    assert not left, f"heaps left behind: {left}"
