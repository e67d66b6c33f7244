"""Handing cache rows over: what one model computed, another continues from, bit for bit."""

from pathlib import Path

import numpy as np
import pytest
import torch

from common.model.kv_cache import kv_block_bytes, read_kv, write_kv
from tests.unit.model.reference_models import VOCAB, save_reference
from tests.unit.model.tiny_models import TINY_RANDOM, feed, int64, open_model


@pytest.fixture(params=["latent", "grouped"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "latent":
        return TINY_RANDOM
    save_reference(tmp_path, "qwen3-plain")
    return tmp_path


def test_another_model_with_other_blocks_goes_on_with_the_same_bits(directory: Path) -> None:
    ids = np.random.default_rng(0).integers(0, VOCAB, 70).tolist()
    prefill, decode = open_model(directory, block_size=32), open_model(directory, block_size=16)
    table, other_table = [5, 3, 9], [7, 1, 30, 2, 11]
    expected = feed(prefill, [(ids, 0, table)])[0][-1]
    rows = read_kv(prefill.kv_cache_LBPC, int64(table), 0, 69)
    assert rows.shape == (3, 69, prefill.config.kv_row_size)
    write_kv(decode.kv_cache_LBPC, int64(other_table), 0, rows[:, :20])
    write_kv(decode.kv_cache_LBPC, int64(other_table), 20, rows[:, 20:])
    assert torch.equal(feed(decode, [(ids[69:], 69, other_table)])[0][0], expected)
    assert kv_block_bytes(decode.config, 16) == decode.kv_cache_LBPC[:, 0].numel() * 4
