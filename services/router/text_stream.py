"""Accepted tokens of one request in, text for its client out: detokenizer, stop strings, end of sequence.

It lives as long as the request, not as long as an attempt, so a stop string is found across a re-dispatch as well; and
it takes tokens one by one, so its answer does not depend on how they were batched.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from services.router.stop_strings import StopStrings


class Detokenizer(Protocol):
    def push(self, ids: Sequence[int]) -> str: ...
    def flush(self) -> str: ...


@dataclass(frozen=True, slots=True)
class TextDelta:
    """``ids`` are the tokens that this text comes from, as far as they count; text may lag behind its tokens."""

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str = ""


class TextStream:
    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str]) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops)
        self.num_tokens = 0
        self.text = ""

    def push(self, ids: tuple[int, ...], logprobs: tuple[float, ...], finish: str) -> TextDelta:
        """``finish`` "stop" says that the last id is the end of the sequence, which counts but is not shown.

        A stop string ends the text before ``finish`` does; tokens after the one that completes it do not count.
        """
        pieces: list[str] = []
        num_shown = len(ids) - 1 if finish == "stop" and ids else len(ids)
        for number in range(num_shown):
            text, stop = self._stops.push(self._detokenizer.push(ids[number : number + 1]))
            pieces.append(text)
            if stop is not None:
                return self._delta(pieces, ids[: number + 1], logprobs[: number + 1], "stop")
        if finish:
            text, stop = self._stops.push(self._detokenizer.flush())
            pieces += [text] if stop is not None else [text, self._stops.flush()]
            finish = "stop" if stop is not None else finish
        return self._delta(pieces, ids, logprobs, finish)

    def _delta(self, pieces: list[str], ids: tuple[int, ...], logprobs: tuple[float, ...], finish: str) -> TextDelta:
        text = "".join(pieces)
        self.num_tokens += len(ids)
        self.text += text
        return TextDelta(text, ids, logprobs, finish)
