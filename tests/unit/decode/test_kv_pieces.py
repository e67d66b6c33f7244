"""KV in pieces: complete when every row of every layer is there, in whatever order and however often it came."""

from hypothesis import given
from hypothesis import strategies as st

from services.decode.kv_pieces import KvPiece, KvPieces

LAYERS, TOKENS, ROW_BYTES = 2, 5, 3


def make() -> KvPieces:
    return KvPieces(LAYERS, TOKENS, LAYERS * ROW_BYTES)


def piece(first_layer: int, num_layers: int, start: int, num_tokens: int, num_bytes: int | None = None) -> KvPiece:
    size = max(num_layers * num_tokens * ROW_BYTES, 0) if num_bytes is None else num_bytes
    return KvPiece(first_layer, num_layers, start, num_tokens, memoryview(bytes(size)))


def test_pieces_of_layers_and_chunks() -> None:
    kv = make()
    for number, part in enumerate((piece(1, 1, 2, 3), piece(0, 2, 0, 2), piece(1, 1, 2, 3), piece(0, 1, 2, 3))):
        assert not kv.is_complete
        assert kv.add(part), number
    assert kv.is_complete and len(kv.pieces) == 3 and kv.num_bytes == LAYERS * TOKENS * ROW_BYTES
    kv.clear()
    assert kv.num_bytes == 0 and not kv.is_complete


def test_what_does_not_fit_is_not_kept() -> None:
    kv = make()
    wrong = [
        piece(0, 3, 0, 1),
        piece(2, 1, 0, 1),
        piece(-1, 1, 0, 1),
        piece(0, 1, 4, 2),
        piece(0, 1, -1, 2),
        piece(0, 0, 0, 1),
        piece(0, 1, 0, 0),
        piece(0, 1, 0, 1, ROW_BYTES + 1),
    ]
    assert not any(kv.add(part) for part in wrong)
    assert kv.num_bytes == 0
    big = [piece(0, 2, start, stop - start) for start in range(5) for stop in range(start + 1, 6)]
    assert not all(kv.add(part) for part in big), "twice as much as there can be"
    assert kv.num_bytes <= 2 * LAYERS * TOKENS * ROW_BYTES


_spans = st.tuples(st.integers(0, 1), st.integers(1, 2), st.integers(0, 4), st.integers(1, 5))


@given(st.lists(_spans))
def test_complete_is_every_row_of_every_layer(spans: list[tuple[int, int, int, int]]) -> None:
    kv, seen = make(), set[tuple[int, int]]()
    for first_layer, num_layers, start, num_tokens in spans:
        if kv.add(piece(first_layer, num_layers, start, num_tokens)):
            layers, positions = range(first_layer, first_layer + num_layers), range(start, start + num_tokens)
            seen |= {(layer, position) for layer in layers for position in positions}
        assert kv.is_complete == (len(seen) == LAYERS * TOKENS)
