"""Tensors of a Hugging Face directory, read one at a time from memory-mapped safetensors files.

Nothing is read before it is asked for, so a decode rank touches only the pages of the experts that it holds. The pages
are the host's page cache: what several processes of a host map is read from the disk once, as long as memory lasts.
No mapped page is ever written to, and experts go from the mapping straight into their place.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from common.model.config import ModelConfig, load_model_config
from common.model.experts import ExpertLayout

_STORED_DTYPES = {"F32", "BF16"}


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """What has been read when one more tensor has been. Bytes are those stored.

    `checkpoint_bytes` are the bytes of all files: about what a whole model reads, while a decode rank stays below.
    """

    tensor: str
    num_tensors: int
    read_bytes: int
    checkpoint_bytes: int

    def counters(self) -> dict[str, int]:
        """For heartbeats."""
        return {
            "loaded_tensors": self.num_tensors,
            "loaded_bytes": self.read_bytes,
            "checkpoint_bytes": self.checkpoint_bytes,
        }


class Checkpoint:
    """The weights of one model directory. Open with `Checkpoint.open(directory)`.

    `on_progress` is called after each tensor that is read, in the thread that reads. Every failure (missing directory,
    broken file, missing tensor, wrong shape or dtype) is a ValueError of one line that names the file and the tensor.
    """

    def __init__(
        self,
        directory: Path,
        config: ModelConfig,
        file_of_tensor: dict[str, Path],
        on_progress: Callable[[LoadProgress], None] | None = None,
    ) -> None:
        self.directory = directory
        self.config = config
        self.expert_layout = ExpertLayout(config.hidden_size, config.moe_intermediate_size)
        self._file_of_tensor = file_of_tensor
        self._open_files: dict[Path, Any] = {}
        self._on_progress = on_progress
        self._num_read = self._read_bytes = 0
        self._checkpoint_bytes = sum(path.stat().st_size for path in set(file_of_tensor.values()))

    @classmethod
    def open(cls, directory: Path | str, on_progress: Callable[[LoadProgress], None] | None = None) -> "Checkpoint":
        """Reads config.json and the names of the tensors: model.safetensors, or the shards of its index."""
        directory = Path(directory)
        config = load_model_config(directory)
        index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
        if index.exists():
            return cls(directory, config, _read_index(index), on_progress)
        if not single.exists():
            raise ValueError(f"{directory}: neither model.safetensors nor model.safetensors.index.json is there")
        names: list[str] = _open_file(single).keys()
        return cls(directory, config, dict.fromkeys(names, single), on_progress)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of_tensor

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A private fp32 copy of the tensor, which must have this shape and be stored as F32 or BF16."""
        return self._mapped(name, shape).to(torch.float32, copy=True)

    def _mapped(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor as stored, in the mapping of its file: to be read only, and soon."""
        path = self._file_of_tensor.get(name)
        if path is None:
            raise ValueError(f"{self.directory}: tensor {name} is missing")
        if path not in self._open_files:
            self._open_files[path] = _open_file(path)
        file = self._open_files[path]
        try:
            stored = file.get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"{path}: tensor {name} cannot be read: {error}") from None
        if tuple(stored.get_shape()) != shape:
            raise ValueError(f"{path}: tensor {name} has shape {tuple(stored.get_shape())}, expected {shape}")
        if stored.get_dtype() not in _STORED_DTYPES:
            raise ValueError(f"{path}: tensor {name} is stored as {stored.get_dtype()}; supported: F32, BF16")
        tensor: torch.Tensor = file.get_tensor(name)
        if self._on_progress is not None:
            self._num_read += 1
            self._read_bytes += tensor.nbytes
            self._on_progress(LoadProgress(name, self._num_read, self._read_bytes, self._checkpoint_bytes))
        return tensor

    def read_expert(self, layer: int, logical_expert: int, out_row: torch.Tensor) -> None:
        """Writes one expert in the computing layout into out_row (fp32 [expert_layout.row_size], say in a heap).

        `layer` counts all layers, dense ones included.
        """
        assert self.config.is_moe_layer(layer), f"layer {layer} has no experts"
        prefix = f"model.layers.{layer}.mlp.experts.{logical_expert}"
        hidden, inter = self.config.hidden_size, self.config.moe_intermediate_size
        self.expert_layout.pack(
            self._mapped(f"{prefix}.gate_proj.weight", (inter, hidden)),
            self._mapped(f"{prefix}.up_proj.weight", (inter, hidden)),
            self._mapped(f"{prefix}.down_proj.weight", (hidden, inter)),
            out_row=out_row,
        )


def _read_index(path: Path) -> dict[str, Path]:
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = {str(tensor): path.parent / str(file) for tensor, file in names.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: not a safetensors index (a JSON object with a weight_map)") from None
    for file in sorted(set(files.values())):
        if not file.exists():
            raise ValueError(f"{path}: names {file.name}, which is not there")
    return files


def _open_file(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from None
