"""Tensors of a Hugging Face directory, read one at a time from memory-mapped safetensors files.

Nothing is read before it is asked for, so a decode rank touches only the pages of the experts that it holds.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from common.model.config import ModelConfig, load_model_config
from common.model.experts import ExpertLayout, row_checksum

_STORED_DTYPES = {"F32", "BF16"}


class Checkpoint:
    """The weights of one model directory. Open with `Checkpoint.open(directory)`.

    Every failure (missing directory, broken file, missing tensor, wrong shape or dtype) is a ValueError of one line
    that names the file and the tensor.
    """

    def __init__(self, directory: Path, config: ModelConfig, file_of_tensor: dict[str, Path]) -> None:
        self.directory = directory
        self.config = config
        self.expert_layout = ExpertLayout(config.hidden_size, config.moe_intermediate_size)
        self._file_of_tensor = file_of_tensor
        self._open_files: dict[Path, Any] = {}
        self._expert_checksums: dict[tuple[int, int], int] = {}

    @classmethod
    def open(cls, directory: Path | str) -> "Checkpoint":
        """Reads config.json and the names of the tensors: model.safetensors, or the shards of its index."""
        directory = Path(directory)
        config = load_model_config(directory)
        index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
        if index.exists():
            return cls(directory, config, _read_index(index))
        if not single.exists():
            raise ValueError(f"{directory}: neither model.safetensors nor model.safetensors.index.json is there")
        names: list[str] = _open_file(single).keys()
        return cls(directory, config, dict.fromkeys(names, single))

    def __contains__(self, name: str) -> bool:
        return name in self._file_of_tensor

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A private fp32 copy of the tensor, which must have this shape and be stored as F32 or BF16."""
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
        return tensor.to(torch.float32, copy=True)

    def expert(self, layer: int, logical_expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(gate_IH, up_IH, down_HI) of one expert, as stored. `layer` counts all layers, dense ones included."""
        assert self.config.is_moe_layer(layer), f"layer {layer} has no experts"
        prefix = f"model.layers.{layer}.mlp.experts.{logical_expert}"
        hidden, inter = self.config.hidden_size, self.config.moe_intermediate_size
        return (
            self.tensor(f"{prefix}.gate_proj.weight", (inter, hidden)),
            self.tensor(f"{prefix}.up_proj.weight", (inter, hidden)),
            self.tensor(f"{prefix}.down_proj.weight", (hidden, inter)),
        )

    def read_expert(self, layer: int, logical_expert: int, out_row: torch.Tensor) -> None:
        """Writes one expert in the computing layout into out_row (fp32 [expert_layout.row_size], say in a heap)."""
        self.expert_layout.pack(*self.expert(layer, logical_expert), out_row=out_row)

    def expert_checksum(self, layer: int, logical_expert: int) -> int:
        """`row_checksum` of the expert's packed row: what a copy in any rank's memory must have. Remembered."""
        key = (layer, logical_expert)
        if key not in self._expert_checksums:
            row = torch.empty(self.expert_layout.row_size)
            self.read_expert(layer, logical_expert, row)
            self._expert_checksums[key] = row_checksum(row)
        return self._expert_checksums[key]


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
