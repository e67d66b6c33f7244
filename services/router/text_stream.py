"""Accepted tokens of one request in, text for its client out: detokenizer, stop strings, end of sequence.

It lives as long as the request, not as long as an attempt, so a stop string is found across a re-dispatch as well; and
its answer does not depend on how tokens were batched: stop strings are looked for behind each one.
"""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from common.messages import TopLogprobs
from services.router.stop_strings import StopStrings


class Detokenizer(Protocol):
    def push(self, ids: Sequence[int]) -> str: ...
    def flush(self) -> str: ...


class TextDelta(msgspec.Struct, frozen=True):
    """``ids`` are the tokens that this text comes from, as far as they count; text may lag behind its tokens.

    ``stop`` is the stop string that ended the text, if one did. The first delta has the ``prompt_logprobs``, if asked.
    """

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str = ""
    stop: str | None = None
    top_logprobs: tuple[TopLogprobs, ...] = ()
    prompt_logprobs: tuple[tuple[float, TopLogprobs], ...] = ()
    missed_experts: bool = False


class TextStream:
    """Stop strings are looked for behind the text of the first ``min_tokens`` tokens."""

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str], min_tokens: int = 0) -> None:
        self._detokenizer = detokenizer
        self._stops, self._has_stops = StopStrings(stops), bool(stops)
        self._min_tokens = min_tokens
        self.num_tokens = 0

    def push(
        self,
        ids: tuple[int, ...],
        logprobs: tuple[float, ...],
        finish: str,
        top_logprobs: tuple[TopLogprobs, ...] = (),
        prompt_logprobs: tuple[tuple[float, TopLogprobs], ...] = (),
        missed_experts: bool = False,
    ) -> TextDelta:
        """``finish`` "stop" says that the last id is the end of the sequence, which counts but is not shown.

        A stop string ends the text before ``finish`` does; tokens after the one that completes it do not count.
        """
        shown = ids[:-1] if finish == "stop" else ids
        if self._has_stops:
            text, num_counted, stop = self._push_each(shown, len(ids), finish)
        else:
            text, num_counted, stop = self._detokenizer.push(shown), len(ids), None
            if finish:
                text += self._detokenizer.flush()
        self.num_tokens += num_counted
        return TextDelta(
            text,
            ids[:num_counted],
            logprobs[:num_counted],
            finish if stop is None else "stop",
            stop,
            top_logprobs[:num_counted],
            prompt_logprobs,
            missed_experts,
        )

    def _push_each(self, ids: tuple[int, ...], num_ids: int, finish: str) -> tuple[str, int, str | None]:
        """Text, number of the tokens that count, and the stop string. ``num_ids``: with the one that is not shown."""
        pieces: list[str] = []
        for number in range(len(ids)):
            text, stop = self._find_stop(self._detokenizer.push(ids[number : number + 1]), self.num_tokens + number)
            pieces.append(text)
            if stop is not None:
                return "".join(pieces), number + 1, stop
        if not finish:
            return "".join(pieces), num_ids, None
        text, stop = self._find_stop(self._detokenizer.flush(), self.num_tokens + num_ids - 1)
        pieces += [text] if stop is not None else [text, self._stops.flush()]
        return "".join(pieces), num_ids, stop

    def _find_stop(self, text: str, index: int) -> tuple[str, str | None]:
        """``index`` is that of the token which completed ``text``."""
        return (text, None) if index < self._min_tokens else self._stops.push(text)
