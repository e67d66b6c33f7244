"""Step words, header tags and header banks: the arithmetic of PROTOCOL section 1.

    step word   epoch << 40 | n      n = 1, 2, ... counts the EP operations of the epoch; 0 is "never written"
    header word tag << 32 | data     tag = low 12 bits of the epoch, low 20 bits of n

Words only grow and are never cleared, so whatever an older epoch or a zombie left compares low. An epoch fits in 23
bits, so that a word stays positive as int64.
"""

EPOCH_SHIFT = 40
MAX_EPOCH = (1 << 23) - 1


def epoch_floor(epoch: int) -> int:
    """Every word of ``epoch`` or a later one is at least this."""
    if not 1 <= epoch <= MAX_EPOCH:
        raise ValueError(f"epoch must be in 1..{MAX_EPOCH}, got {epoch}")
    return epoch << EPOCH_SHIFT


def header_bank(epoch: int, ordinal: int) -> int:
    """Which of the 4 header buffers the ``ordinal``-th header of ``epoch`` uses.

    A rank may publish its next header while a neighbour still reads the last one (idle rounds have nothing in
    between), so neighbours in time need different banks; a newcomer does not know how many headers the old epoch had,
    so first headers have banks of their own.
    """
    return 2 + (epoch & 1) if ordinal == 0 else ordinal & 1


def header_tag(step: int) -> int:
    """32 bits of a step word, in the upper half of each header word, so that no header is read half (PROTOCOL 1.3)."""
    return (step >> EPOCH_SHIFT & 0xFFF) << 20 | step & 0xFFFFF


def tagged(step: int, data: list[int]) -> list[int]:
    """Header words as they lie in memory, unsigned 64-bit."""
    tag = header_tag(step) << 32
    return [tag | value for value in data]
