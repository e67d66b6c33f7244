"""The event of one token in the middle of a stream, put together from bytes that are ready: all of a stream's chunks
are alike but for text and log-probability. The same bytes as those of the dicts of `openai_format`, for less work.
"""

import msgspec

from services.router.openai_format import Body

_encode = msgspec.json.Encoder().encode


class EventTemplate:
    """``body``: a chunk made the long way, of one choice without text and log-probabilities."""

    def __init__(self, body: Body, chat: bool) -> None:
        self._chat = chat
        empty = b'"delta":{"content":""},"logprobs":null' if chat else b'"text":"","logprobs":null'
        # In a string of JSON its quotes would be escaped, so it stands there once.
        before, found, after = _encode(body).partition(empty)
        assert found
        self._before = b"data: " + before + (b'"delta":{"content":' if chat else b'"text":')
        self._between = b'},"logprobs":' if chat else b',"logprobs":'
        self._after = after + b"\n\n"

    def without_logprobs(self, text: str) -> bytes:
        return b"".join((self._before, _encode(text), self._between, b"null", self._after))

    def with_logprob(self, text: str, token: str, logprob: float, text_offset: int) -> bytes:
        """``text_offset``: characters of the tokens before this one; chats do not tell."""
        value, name = _encode(logprob), _encode(token)
        if self._chat:
            parts = (b'{"content":[{"token":', name, b',"logprob":', value, b',"bytes":', _encode(list(token.encode())))
            shown = b"".join((*parts, b',"top_logprobs":[]}],"refusal":null}'))
        else:
            head = b'{"text_offset":[%d],"token_logprobs":[%b],"tokens":[%b]' % (text_offset, value, name)
            shown = b'%b,"top_logprobs":[{%b:%b}]}' % (head, name, value)
        return b"".join((self._before, _encode(text), self._between, shown, self._after))
