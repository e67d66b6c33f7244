"""Reading tensors: shards, bf16, only what is asked for; every failure names the file and the tensor."""

import json
import re
import shutil
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.model.checkpoint import Checkpoint, LoadProgress
from common.model.experts import ExpertLayout, LocalExperts, row_checksum
from common.model.kv_cache import kv_cache_shape
from common.model.model import Model
from kernels.cpu.experts import expert_rows
from tests.unit.model.tiny_models import TINY_RANDOM, open_model

UP = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    shutil.copytree(TINY_RANDOM, tmp_path / "model")
    return tmp_path / "model"


def rewrite(directory: Path, change: dict[str, torch.Tensor | None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in change.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors")


def shard(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    weight_map = {name: f"model-{1 + (hash_of % 2)}.safetensors" for hash_of, name in enumerate(tensors)}
    for file in sorted(set(weight_map.values())):
        save_file({name: t for name, t in tensors.items() if weight_map[name] == file}, directory / file)
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def packed(checkpoint: Checkpoint, layer: int, expert: int) -> torch.Tensor:
    row = torch.full((checkpoint.expert_layout.row_size,), float("nan"))
    checkpoint.read_expert(layer, expert, row)
    return row


def test_shards_hold_the_same_tensors_as_one_file(directory: Path) -> None:
    whole = Checkpoint.open(TINY_RANDOM)
    shard(directory)
    sharded = Checkpoint.open(directory)
    assert torch.equal(packed(sharded, 1, 3), packed(whole, 1, 3))
    shape = (sharded.config.vocab_size, sharded.config.hidden_size)
    assert torch.equal(sharded.tensor("lm_head.weight", shape), whole.tensor("lm_head.weight", shape))


def test_a_whole_model_reads_each_tensor_once_and_says_so(directory: Path) -> None:
    shard(directory)
    stored: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        stored |= load_file(path)
    seen: list[LoadProgress] = []
    checkpoint = Checkpoint.open(directory, on_progress=seen.append)
    assert seen == []
    Model(checkpoint, LocalExperts(checkpoint), torch.zeros(kv_cache_shape(checkpoint.config, 2, 16)))
    assert sorted(progress.tensor for progress in seen) == sorted(stored)
    assert [progress.num_tensors for progress in seen] == list(range(1, len(stored) + 1))
    for before, after in pairwise(seen):
        assert after.read_bytes - before.read_bytes == stored[after.tensor].nbytes
    total_bytes = sum(tensor.nbytes for tensor in stored.values())
    assert seen[-1].read_bytes == total_bytes
    assert total_bytes < seen[-1].checkpoint_bytes < 1.3 * total_bytes  # the files have headers


def mapped_kib(path: Path) -> dict[str, int]:
    """Sums of what /proc says about this process's mappings of the file."""
    sums: dict[str, int] = defaultdict(int)
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            inside = line.endswith(str(path))
        elif inside and values[-1] == "kB":
            sums[name.removesuffix(":")] += int(values[0])
    return sums


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="asks Linux about mapped pages")
def test_only_pages_of_what_is_asked_for_are_mapped_and_none_is_copied(directory: Path) -> None:
    path = directory / "model.safetensors"
    rewrite(directory, {"a_large_tensor_that_nobody_wants": torch.zeros(8 << 20)})
    checkpoint = Checkpoint.open(directory)
    packed(checkpoint, 1, 3)
    touched = mapped_kib(path)
    assert touched["Size"] > 32 << 10, "the file is not mapped"
    assert 0 < touched["Rss"] < 2 << 10
    Model(checkpoint, LocalExperts(checkpoint), torch.zeros(kv_cache_shape(checkpoint.config, 2, 16)))
    whole = mapped_kib(path)
    assert whole["Rss"] > touched["Rss"]
    assert whole["Private_Dirty"] == 0, "a mapped page was written to, and is no longer the host's one copy"


def test_bf16_is_widened_exactly(directory: Path) -> None:
    stored = load_file(directory / "model.safetensors")[UP].to(torch.bfloat16)
    rewrite(directory, {UP: stored})
    checkpoint = Checkpoint.open(directory)
    got = checkpoint.tensor(UP, tuple(stored.shape))
    assert got.dtype == torch.float32
    assert torch.equal(got, stored.float())
    layout = checkpoint.expert_layout
    assert torch.equal(layout.views(packed(checkpoint, 1, 3)).gate_up_HG[:, layout.intermediate_size :], got.t())


def test_a_tensor_is_a_private_copy() -> None:
    checkpoint = Checkpoint.open(TINY_RANDOM)
    tensor = checkpoint.tensor(UP, (16, 64))
    expected = tensor.clone()
    tensor.zero_()
    assert torch.equal(checkpoint.tensor(UP, (16, 64)), expected)


def test_a_rank_without_an_expert_never_reads_it(directory: Path) -> None:
    rewrite(directory, {UP: None})
    checkpoint = Checkpoint.open(directory)
    packed(checkpoint, 1, 2)
    with pytest.raises(ValueError, match=re.escape(f"tensor {UP} is missing")):
        packed(checkpoint, 1, 3)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(16, 63), "has shape (16, 63), expected (16, 64)"),
        (torch.zeros(16, 64, dtype=torch.float16), "is stored as F16; supported: F32, BF16"),
    ],
)
def test_wrong_tensors_are_named_with_their_file(directory: Path, tensor: torch.Tensor, message: str) -> None:
    rewrite(directory, {UP: tensor})
    with pytest.raises(ValueError, match=re.escape(f"model.safetensors: tensor {UP} {message}")):
        packed(Checkpoint.open(directory), 1, 3)


def test_a_model_without_a_needed_tensor_does_not_load(directory: Path) -> None:
    rewrite(directory, {"model.norm.weight": None})
    with pytest.raises(ValueError, match=r"tensor model\.norm\.weight is missing"):
        open_model(directory)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff" * 100])
def test_broken_files_are_named(directory: Path, content: bytes) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{path}: not a readable safetensors file")):
        Checkpoint.open(directory)
    path.unlink()
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor"):
        Checkpoint.open(directory)


def test_a_broken_index_is_named(directory: Path) -> None:
    path = directory / "model.safetensors.index.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a safetensors index"):
        Checkpoint.open(directory)
    path.write_text(json.dumps({"weight_map": {UP: "model-9.safetensors"}}))
    with pytest.raises(ValueError, match=r"names model-9\.safetensors, which is not there"):
        Checkpoint.open(directory)


def test_a_shard_without_what_the_index_promises_is_named(directory: Path) -> None:
    shard(directory)
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    other = {"model-1.safetensors": "model-2.safetensors", "model-2.safetensors": "model-1.safetensors"}
    content["weight_map"][UP] = other[content["weight_map"][UP]]
    index.write_text(json.dumps(content))
    file = re.escape(str(directory / content["weight_map"][UP]))
    with pytest.raises(ValueError, match=rf"{file}: tensor {re.escape(UP)} cannot be read"):
        packed(Checkpoint.open(directory), 1, 3)


def test_packed_rows_compute_what_the_stored_matrices_say() -> None:
    torch.manual_seed(0)
    layout = ExpertLayout(hidden_size=10, intermediate_size=3)
    gate, up, down, x = torch.randn(3, 10), torch.randn(3, 10), torch.randn(10, 3), torch.randn(5, 10)
    row = torch.full((layout.row_size,), float("nan"))
    layout.pack(gate, up, down, row)
    expected = (torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t()
    table = layout.table(num_slots=1)
    table.put(0, row)
    got = expert_rows(x, torch.arange(5), torch.zeros(5, dtype=torch.int64), table)
    assert torch.allclose(got, expected, atol=1e-5)
    assert layout.row_bytes % 64 == 0
    assert bool((row[90:] == 0).all()), "padding must be defined: it is part of the checksum"


def test_the_checksum_is_that_of_a_copy_and_finds_a_changed_bit() -> None:
    checkpoint = Checkpoint.open(TINY_RANDOM)
    row = packed(checkpoint, 2, 5)
    checksum = row_checksum(row)
    assert checksum == row_checksum(packed(checkpoint, 2, 5)) != row_checksum(packed(checkpoint, 2, 6))
    row.view(torch.int32)[100] ^= 1
    assert row_checksum(row) != checksum


def test_a_cache_that_does_not_fit_is_refused() -> None:
    checkpoint = Checkpoint.open(TINY_RANDOM)
    exchange = LocalExperts(checkpoint)
    with pytest.raises(ValueError, match="KV cache has shape"):
        Model(checkpoint, exchange, torch.zeros(2, 4, 16, 40))
    with pytest.raises(ValueError, match="contiguous fp32"):
        Model(checkpoint, exchange, torch.zeros(3, 4, 16, 40, dtype=torch.float64))
