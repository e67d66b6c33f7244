"""Copies by a thread outside the interpreter: every byte, zlib's checksum, a bounded rate, and an end that is one."""

import gc
import time
import zlib

import pytest
import torch
from torch import Tensor

from kernels.cpu.background_copy import BackgroundCopy

_DEADLINE_S = 60.0


def noise(num_bytes: int) -> Tensor:
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(num_bytes))


def checksum_of(copy: BackgroundCopy) -> int:
    deadline = time.monotonic() + _DEADLINE_S
    while (checksum := copy.look()[1]) is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return checksum


@pytest.mark.parametrize("num_bytes", [1, 7, 8, 9, 65535, 65536, 65537, 3_000_001])
@pytest.mark.parametrize("offset", [0, 3])
def test_all_bytes_arrive_and_are_summed_as_zlib_sums_them(num_bytes: int, offset: int) -> None:
    source = noise(num_bytes + offset)[offset:]
    target = torch.zeros(num_bytes + offset + 1, dtype=torch.uint8)[offset:-1]
    copy = BackgroundCopy(target, source, 1e12)
    assert checksum_of(copy) == zlib.crc32(source.numpy().tobytes())
    assert copy.look()[0] == num_bytes and torch.equal(target, source)
    copy.end()


def test_the_checksum_is_of_what_arrived() -> None:
    source, target = noise(1 << 20), torch.zeros(1 << 20, dtype=torch.uint8)
    copy = BackgroundCopy(target, source, 16e6)
    source[-100:] = 7  # while it is read
    assert checksum_of(copy) == zlib.crc32(target.numpy().tobytes())
    copy.end()


def test_no_faster_than_the_rate() -> None:
    target, begun = torch.zeros(1 << 20, dtype=torch.uint8), time.monotonic()
    copy = BackgroundCopy(target, noise(1 << 20), 8e6)
    checksum_of(copy)
    # All but the last slice has been paid for.
    assert time.monotonic() - begun >= ((1 << 20) - (64 << 10)) / 8e6
    copy.end()


@pytest.mark.parametrize("forgotten", [False, True])
def test_after_its_end_nothing_is_written(forgotten: bool) -> None:
    target = torch.zeros(64 << 20, dtype=torch.uint8)
    copy = BackgroundCopy(target, torch.ones(64 << 20, dtype=torch.uint8), 32e6)
    deadline = time.monotonic() + _DEADLINE_S
    while copy.look()[0] == 0:
        assert time.monotonic() < deadline
    if forgotten:
        del copy
        gc.collect()
    else:
        copy.end()
        copy.end()
    num_written = int(target.count_nonzero())
    assert 0 < num_written < len(target)
    time.sleep(0.05)  # what a thread that is still there would use
    assert int(target.count_nonzero()) == num_written


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot copy 9 bytes onto 8"):
        BackgroundCopy(torch.zeros(8, dtype=torch.uint8), noise(9), 1e6)
