"""KV of one attempt as it arrives: pieces of layers and positions, in any order, until nothing is missing. Pure.

A piece that comes again, or overlaps another, has the same bits: KV is a function of the tokens, and an attempt has one
text. So pieces are only counted, and all of them are written.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KvPiece:
    """float32 [num_layers, num_tokens, row] of positions start, start + 1, ..."""

    first_layer: int
    num_layers: int
    start: int
    num_tokens: int
    frame: memoryview


class KvPieces:
    """For ``num_tokens`` tokens of ``bytes_per_token`` over all ``num_layers`` layers."""

    def __init__(self, num_layers: int, num_tokens: int, bytes_per_token: int) -> None:
        self._num_layers, self._num_tokens = num_layers, num_tokens
        self._row_bytes = bytes_per_token // num_layers
        self._pieces: dict[tuple[int, int, int, int], KvPiece] = {}
        self.num_bytes = 0

    @property
    def pieces(self) -> tuple[KvPiece, ...]:
        return tuple(self._pieces.values())

    def add(self, piece: KvPiece) -> bool:
        """False, and nothing kept, when it is no piece of this KV, or there would be twice as much as there can be."""
        key = (piece.first_layer, piece.num_layers, piece.start, piece.num_tokens)
        if key in self._pieces:
            return True
        num_bytes, all_bytes = piece.frame.nbytes, self._num_layers * self._num_tokens * self._row_bytes
        fits = (
            0 <= piece.first_layer < piece.first_layer + piece.num_layers <= self._num_layers
            and 0 <= piece.start < piece.start + piece.num_tokens <= self._num_tokens
            and num_bytes == piece.num_layers * piece.num_tokens * self._row_bytes
        )
        if not fits or self.num_bytes + num_bytes > 2 * all_bytes:
            return False
        self._pieces[key] = piece
        self.num_bytes += num_bytes
        return True

    def add_whole(self, frame: memoryview) -> bool:
        """All layers and positions at once."""
        return self.add(KvPiece(0, self._num_layers, 0, self._num_tokens, frame))

    def clear(self) -> None:
        """They are written, or not wanted any more."""
        self._pieces.clear()
        self.num_bytes = 0

    @property
    def is_complete(self) -> bool:
        whole = (self._num_layers, self._num_tokens)
        if any((piece.num_layers, piece.num_tokens) == whole for piece in self._pieces.values()):
            return True
        return all(self._covers(layer) for layer in range(self._num_layers))

    def _covers(self, layer: int) -> bool:
        spans = sorted(
            (piece.start, piece.start + piece.num_tokens)
            for piece in self._pieces.values()
            if piece.first_layer <= layer < piece.first_layer + piece.num_layers
        )
        end = 0
        for start, stop in spans:
            if start > end:
                return False
            end = max(end, stop)
        return end == self._num_tokens
