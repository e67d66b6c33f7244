"""The event of some tokens in the middle of a stream, put together from bytes that are ready: all of a stream's chunks
are alike but for text and log-probabilities. The same bytes as those of the dicts of `openai_format`, for less work.
"""

import msgspec

from services.router.openai_format import Body

_encode = msgspec.json.Encoder().encode


class EventTemplate:
    """``body``: a chunk made the long way, of one choice without text and log-probabilities."""

    def __init__(self, body: Body, chat: bool) -> None:
        empty = b'"delta":{"content":""},"logprobs":null' if chat else b'"text":"","logprobs":null'
        # In a string of JSON its quotes would be escaped, so it stands there once.
        before, found, after = _encode(body).partition(empty)
        assert found
        self._before = b"data: " + before + (b'"delta":{"content":' if chat else b'"text":')
        self._between = b'},"logprobs":' if chat else b',"logprobs":'
        self._after = after + b"\n\n"

    def event(self, text: str, logprobs: Body | None) -> bytes:
        return b"".join((self._before, _encode(text), self._between, _encode(logprobs), self._after))
