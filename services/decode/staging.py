"""Experts on their way in: copied beside the rounds, so that no token waits for them.

Each expert is read from the memory of a live copy, one-sided: its owner takes no part. Only copies that serve under the
placement in force are read: those stay where they are until the next one, while a row that an older placement has left
behind may be overwritten by its owner's own staging at any moment. All the same an owner may be writing (it may have
heard of a newer view first), so a copy counts only if the source's tag is the same before and after, and if its bytes
have the checksum of the tag, which comes from the checkpoint. A source that fails is not asked again; with none left,
or if two tags disagree, the expert is read from the checkpoint, in one piece.

    stage(wanted) -> copy ... -> all here -> (the placement comes into force: `ExpertSlots.adopt` finds everything)

Legend: L mixture-of-experts layers, P expert slots of a layer, F floats of a row.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from common.placement import PhysicalToLogical
from services.decode.expert_copy import FLOAT_BYTES, SLICE_BYTES, ExpertCopy, begin_copy
from services.decode.expert_slots import EMPTY, Expert, ExpertRows, ExpertSlots, Tag

_GATHERS_FOR_S = 0.1

PeerRows = Callable[[], Mapping[int, ExpertRows]]


@dataclass(slots=True)
class _Copy:
    """``row`` of this rank is being filled from ``source_row`` of a peer."""

    row: int
    rank: int
    source: ExpertRows
    source_row: int
    tag: Tag
    bytes: ExpertCopy


class CopyPace:
    """How many bytes may be copied now: a rate, and never so much at once that a round would notice."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self._most_bytes = max(FLOAT_BYTES, min(SLICE_BYTES, bytes_per_s * _GATHERS_FOR_S))
        self._allowed_bytes, self._at = 0.0, 0.0

    def allowed_bytes(self, now: float) -> int:
        """What has gathered beyond one slice, or a tenth of a second, is lost: there is no catching up."""
        self._allowed_bytes += (now - self._at) * self.bytes_per_s
        self._allowed_bytes, self._at = min(self._allowed_bytes, self._most_bytes), now
        return int(self._allowed_bytes)

    def spend(self, num_bytes: int) -> None:
        """May go below zero: an expert from the checkpoint comes in one piece."""
        self._allowed_bytes -= num_bytes


class Staging:
    """``peer_rows`` gives the expert rows of the other members, by rank. Without a ``pace`` all is copied at once."""

    def __init__(self, slots: ExpertSlots, peer_rows: PeerRows, own_rank: int, pace: CopyPace | None) -> None:
        self._slots, self._peer_rows, self._own_rank, self._pace = slots, peer_rows, own_rank, pace
        self._peers: Mapping[int, ExpertRows] = {}
        self._present: PhysicalToLogical = ()
        self._wanted_LP: Sequence[Sequence[int]] = ()
        self._generation = 0
        self._lacking: list[Expert] = []
        self._copy: _Copy | None = None
        self._failed: set[tuple[Expert, int]] = set()  # (expert, rank) whose copy was no good
        self._num_from_peers = self._num_from_checkpoint = self._num_bad_copies = self._num_bytes = 0

    def stage(self, wanted_LP: Sequence[Sequence[int]], generation: int, present: PhysicalToLogical) -> None:
        """From now on for this map; what was begun for another is given up. ``present`` is in force, on all ranks."""
        self.drop()
        self._wanted_LP, self._generation, self._present = wanted_LP, generation, present
        self._peers = self._peer_rows()
        self._failed = set()
        self._lacking = self._slots.lacking(wanted_LP)

    def drop(self) -> None:
        """Nothing is on its way any more, and nothing is written. What is whole already stays, as long as its row is
        not needed."""
        if self._copy is not None:
            self._copy.bytes.end()
        self._copy, self._lacking, self._peers = None, [], {}

    @torch.inference_mode()
    def copy(self, now: float) -> bool:
        """Copies as much as the pace allows, of one expert: beginning another costs as much as many bytes do. Whether
        all is here."""
        if self._pace is None:
            while self._lacking:
                self._copy_piece(SLICE_BYTES)
        elif self._copy is not None and self._copy.bytes.keeps_rate:
            self._copy_piece(0)
        elif self._lacking and (allowed_bytes := self._pace.allowed_bytes(now)) >= FLOAT_BYTES:
            self._pace.spend(self._copy_piece(allowed_bytes))
        return not self._lacking

    def counters(self) -> dict[str, int]:
        return {
            "experts_copied": self._num_from_peers,
            "experts_from_checkpoint": self._num_from_checkpoint,
            "bad_expert_copies": self._num_bad_copies,
            "expert_bytes_copied": self._num_bytes,
        }

    def _copy_piece(self, max_bytes: int) -> int:
        """Up to so many bytes, and no further than the end of an expert; how many it was."""
        copy = self._copy = self._copy or self._begin(self._lacking[0])
        if copy is None:
            return self._load_from_checkpoint(self._lacking[0])
        num_bytes = copy.bytes.advance(max_bytes)
        self._num_bytes += num_bytes
        if copy.bytes.checksum is not None:
            self._end(copy, copy.bytes.checksum)
        return num_bytes

    def _begin(self, expert: Expert) -> _Copy | None:
        """None: no live copy can be read, or they do not agree what it should be."""
        layer, logical_expert = expert
        found = []
        for rank, rows in self._peers.items():
            serves = logical_expert in self._present[layer][rank] and (expert, rank) not in self._failed
            row = rows.find(*expert) if serves else None
            tag = rows.tag(row) if row is not None else None
            if row is not None and tag is not None and (tag.layer, tag.logical_expert) == expert:
                found.append((rank, rows, row, tag))
        if not found or len({tag.checksum for *_, tag in found}) > 1:
            return None
        # Spread over the sources: ranks that want the same expert, and experts of the same rank, begin elsewhere.
        rank, rows, row, tag = found[(self._own_rank + sum(expert)) % len(found)]
        own_row = self._slots.take_row(self._wanted_LP, spare_present=True)
        assert own_row != EMPTY, "the monitor plans no more than there is memory for"
        weights_NF, rate = self._slots.rows.weights_NF, self._pace.bytes_per_s if self._pace else None
        return _Copy(own_row, rank, rows, row, tag, begin_copy(weights_NF[own_row], rows.weights_NF[row], rate))

    def _end(self, copy: _Copy, checksum: int) -> None:
        expert = self._lacking[0]
        self._copy = None
        copy.bytes.end()
        if copy.source.tag(copy.source_row) != copy.tag or checksum != copy.tag.checksum:
            self._num_bad_copies += 1
            self._failed.add((expert, copy.rank))
            return
        self._slots.put(copy.row, Tag(*expert, self._generation, checksum))
        self._num_from_peers += 1
        del self._lacking[0]

    def _load_from_checkpoint(self, expert: Expert) -> int:
        row = self._slots.take_row(self._wanted_LP, spare_present=True)
        assert row != EMPTY, "the monitor plans no more than there is memory for"
        self._slots.load(row, *expert, self._generation)
        self._num_from_checkpoint += 1
        del self._lacking[0]
        num_bytes = self._slots.rows.weights_NF[row].nbytes
        self._num_bytes += num_bytes
        return num_bytes
