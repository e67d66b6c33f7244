"""Where everything lies in a heap: the same in every rank's.

    0      version header: magic, digest of the layout, size
    256    regions, each aligned to 256 bytes, in the order of ``regions``

Whatever one rank writes into another's heap lies in a region indexed by the writer's slot (PROTOCOL 1.1), so a
process that is not yet known to be gone can only spoil rows that nobody reads. Extra regions (expert weights, KV
blocks, request table) are the caller's.

Legend: W max_ranks, M max_tokens a rank, K top_k, H hidden_size, N num_header_words.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kernels.fp8 import GROUP_SIZE

ALIGNMENT_BYTES = 256
NUM_HEADER_BANKS = 4
NUM_BARRIER_BANKS = 2
_MAGIC = int.from_bytes(b"regrow01", "little")
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ITEM_BYTES = {dtype: torch.empty(0, dtype=dtype).element_size() for dtype in (*_INTEGERS, *_FLOATS)}


@dataclass(frozen=True, slots=True)
class EpShape:
    """Sizes of the EP group, fixed for its life. ``dispatch_dtype``: of x on its way to the experts, either ``dtype``
    (None) or torch.float8_e4m3fn with a float32 scale for each 128 elements (``kernels.fp8``).
    """

    max_ranks: int
    max_tokens: int
    top_k: int
    hidden_size: int
    num_header_words: int = 8
    dtype: torch.dtype = torch.float32
    dispatch_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name in ("max_ranks", "max_tokens", "top_k", "hidden_size", "num_header_words"):
            if getattr(self, name) < 1:
                raise ValueError(f"EpShape.{name} must be at least 1, got {getattr(self, name)}")
        if self.dtype not in _FLOATS:
            raise ValueError(f"EpShape.dtype must be a plain floating-point type, got {self.dtype}")
        if self.dispatch_dtype not in (None, torch.float8_e4m3fn):
            raise ValueError(f"EpShape.dispatch_dtype must be None or torch.float8_e4m3fn, got {self.dispatch_dtype}")
        if self.is_fp8 and self.hidden_size % GROUP_SIZE:
            raise ValueError(f"EpShape.hidden_size must be a multiple of 128 for float8, got {self.hidden_size}")

    @property
    def is_fp8(self) -> bool:
        return self.dispatch_dtype is not None

    @property
    def row_header_words(self) -> int:
        """int32 words before x in a dispatched row: token, K expert codes, K weights, padded to 16 bytes."""
        return -(-(1 + 2 * self.top_k) // 4) * 4

    @property
    def scale_word(self) -> int:
        """Where the scales of x begin in a row, in int32 words."""
        x_bytes = self.hidden_size * (1 if self.is_fp8 else _ITEM_BYTES[self.dtype])
        return self.row_header_words + -(-x_bytes // 16) * 4

    @property
    def num_scales(self) -> int:
        return self.hidden_size // GROUP_SIZE if self.is_fp8 else 0

    @property
    def row_bytes(self) -> int:
        return 4 * self.scale_word + -(-self.num_scales // 4) * 16


@dataclass(frozen=True, slots=True)
class Region:
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class HeapLayout:
    """Named regions of a heap. Two heaps can be used together if and only if their layouts' digests are equal."""

    ep: EpShape
    regions: Mapping[str, Region]
    nbytes: int
    digest: bytes

    @staticmethod
    def build(ep: EpShape, extra: Mapping[str, tuple[tuple[int, ...], torch.dtype]] | None = None) -> "HeapLayout":
        """EP regions, then ``extra`` (name -> shape, dtype) in the order given.

        >>> layout = HeapLayout.build(EpShape(4, 8, 2, 16), {"tags": ((3, 5), torch.int32)})
        >>> layout.regions["tags"].shape, layout.nbytes % ALIGNMENT_BYTES
        ((3, 5), 0)
        """
        wanted = _ep_regions(ep)
        for name, shape_and_dtype in (extra or {}).items():
            if name in wanted:
                raise ValueError(f"heap region {name!r} is one of the EP regions: choose another name")
            wanted[name] = shape_and_dtype
        regions: dict[str, Region] = {}
        offset = ALIGNMENT_BYTES
        for name, (shape, dtype) in wanted.items():
            if dtype not in _ITEM_BYTES or any(size < 0 for size in shape):
                raise ValueError(f"heap region {name!r}: bad shape {shape} or dtype {dtype}")
            nbytes = math.prod(shape) * _ITEM_BYTES[dtype]
            regions[name] = Region(offset, nbytes, shape, dtype)
            offset += -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        described = repr((ep, [(name, r.offset, r.shape, str(r.dtype)) for name, r in regions.items()]))
        return HeapLayout(ep, regions, offset, hashlib.sha256(described.encode()).digest())

    def view(self, heap_bytes_U8: torch.Tensor, name: str) -> torch.Tensor:
        """The region as a tensor that shares the heap's memory."""
        region = self.regions[name]
        return heap_bytes_U8[region.offset : region.offset + region.nbytes].view(region.dtype).view(region.shape)

    def format(self, heap_bytes_U8: torch.Tensor) -> None:
        """Write the version header into a new heap (all zero). The magic goes last: with it the header is whole."""
        if heap_bytes_U8.numel() != self.nbytes:
            raise ValueError(f"heap has {heap_bytes_U8.numel()} bytes, its layout needs {self.nbytes}")
        header = heap_bytes_U8[:ALIGNMENT_BYTES]
        header[8:40] = torch.frombuffer(bytearray(self.digest), dtype=torch.uint8)
        header.view(torch.int64)[5] = self.nbytes
        header.view(torch.int64)[0] = _MAGIC

    def verify(self, heap_bytes_U8: torch.Tensor, whose: str) -> None:
        """ValueError naming ``whose`` heap unless it was formatted with exactly this layout."""
        self.verify_header(heap_bytes_U8[:ALIGNMENT_BYTES], heap_bytes_U8.numel(), whose)

    def verify_header(self, header_U8: torch.Tensor, nbytes: int, whose: str) -> None:
        """``verify`` for a heap of ``nbytes`` of which only the first 256 bytes are at hand."""
        if header_U8.numel() < ALIGNMENT_BYTES or int(header_U8[:8].view(torch.int64)) != _MAGIC:
            raise ValueError(f"{whose} is not a heap of this version: start all ranks from the same release")
        if bytes(header_U8[8:40].tolist()) != self.digest or nbytes != self.nbytes:
            raise ValueError(
                f"{whose} has another layout than ours: start all ranks with the same model and configuration"
            )


def _ep_regions(ep: EpShape) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    num_ranks = ep.max_ranks
    return {
        "ep_poison": ((num_ranks,), torch.int64),
        # step word, digest, data words; banks: see ElasticGroup.
        "ep_header": ((NUM_HEADER_BANKS, num_ranks, 2 + ep.num_header_words), torch.int64),
        "ep_barrier_word": ((NUM_BARRIER_BANKS, num_ranks), torch.int64),
        # step word, number of rows: beside each other (PROTOCOL 1.2).
        "ep_dispatch_word": ((num_ranks, 2), torch.int64),
        "ep_combine_word": ((num_ranks,), torch.int64),
        "ep_dispatch_rows": ((num_ranks, ep.max_tokens, ep.row_bytes), torch.uint8),
        "ep_combine_rows": ((num_ranks, ep.max_tokens, ep.top_k, ep.hidden_size), ep.dtype),
        # For ranks that sleep on the host, see `doorbell`: rings by source; slot + 1 for whose ring the owner sleeps.
        "ep_bell": ((num_ranks,), torch.int64),
        "ep_sleeper": ((1,), torch.int64),
    }
