"""Bodies of the OpenAI API as plain dicts: completions, chat completions, their chunks, errors, model cards.

Fields and their order are those of the OpenAI documentation; ``stop_reason`` (the stop string or stop token id that
ended a choice) is vLLM's, and errors carry the HTTP status as ``code``, as vLLM's do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import msgspec

Body = dict[str, Any]

_ERROR_TYPES = {
    400: "BadRequestError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    413: "RequestEntityTooLargeError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}


class TokenLogprob(msgspec.Struct, frozen=True):
    """A token as shown to a client, and the natural logarithm of its probability; None: nothing stands before it.

    ``top`` are the alternatives that were asked for, the likeliest first; ``num_characters`` is the token's part in the
    text, in which special tokens have none.
    """

    text: str
    logprob: float | None
    num_characters: int
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int

    def body(self) -> Body:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """What all bodies of one response share. ``created`` is in seconds since 1970."""

    id: str
    model: str
    created: int
    chat: bool

    def whole(self, choices: list[Body], usage: Usage) -> Body:
        """The answer to a request without ``stream``."""
        return {**self._body("chat.completion" if self.chat else "text_completion", choices), "usage": usage.body()}

    def chunk(self, choices: list[Body], usage: Usage | None = None) -> Body:
        """A part of a stream. Without choices and with ``usage`` it is the last one."""
        body = self._body("chat.completion.chunk" if self.chat else "text_completion", choices)
        if usage is not None:
            body["usage"] = usage.body()
        return body

    def _body(self, object_name: str, choices: list[Body]) -> Body:
        return {
            "id": self.id,
            "object": object_name,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def chat_choice(index: int, text: str, logprobs: Body | None, finish: str, stop_reason: int | str | None) -> Body:
    message = {"role": "assistant", "content": text, "refusal": None}
    return {"index": index, "message": message, "logprobs": logprobs, **_end(finish, stop_reason)}


def chat_delta(index: int, text: str, logprobs: Body | None, finish: str, stop_reason: int | str | None) -> Body:
    return {"index": index, "delta": {"content": text}, "logprobs": logprobs, **_end(finish, stop_reason)}


def chat_role(index: int) -> Body:
    """The first delta of each choice of a chat."""
    return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, **_end("", None)}


def completion_choice(index: int, text: str, logprobs: Body | None, finish: str, stop_reason: int | str | None) -> Body:
    """Whole, or a part of a stream."""
    return {"index": index, "text": text, "logprobs": logprobs, **_end(finish, stop_reason)}


def marked(choice: Body, missed_experts: bool) -> Body:
    """A field of ours: some of its tokens were computed without an expert that they were routed to."""
    return {**choice, "missing_experts": True} if missed_experts else choice


def completion_logprobs(tokens: Sequence[TokenLogprob], text_offset: int) -> Body:
    """The legacy format: parallel lists. ``text_offset``: characters of the tokens before these.

    A token's alternatives are a map by text, in which the token itself always is. The first token of a prompt has
    neither.
    """
    offsets = []
    for token in tokens:
        offsets.append(text_offset)
        text_offset += token.num_characters
    return {
        "text_offset": offsets,
        "token_logprobs": [token.logprob for token in tokens],
        "tokens": [token.text for token in tokens],
        "top_logprobs": [_alternatives(token) for token in tokens],
    }


def plain_completion_logprobs(
    texts: Sequence[str], logprobs: Sequence[float], sizes: Sequence[int], text_offset: int
) -> Body:
    """`completion_logprobs` of tokens without alternatives, for less work. ``sizes``: their characters."""
    return {
        "text_offset": list(accumulate(sizes[:-1], initial=text_offset)),
        "token_logprobs": logprobs,
        "tokens": texts,
        "top_logprobs": [{text: logprob} for text, logprob in zip(texts, logprobs, strict=True)],
    }


def _alternatives(token: TokenLogprob) -> dict[str, float] | None:
    if token.logprob is None:
        return None
    alternatives: dict[str, float] = {}
    for text, logprob in token.top:
        alternatives.setdefault(text, logprob)
    # Several ids may show as the same text; the chosen one has the say.
    alternatives[token.text] = token.logprob
    return alternatives


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> Body:
    content = [
        {
            **_chat_token(token.text, token.logprob),
            "top_logprobs": [_chat_token(text, logprob) for text, logprob in token.top],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def plain_chat_logprobs(texts: Sequence[str], logprobs: Sequence[float]) -> Body:
    """`chat_logprobs` of tokens without alternatives, for less work."""
    tokens = [_chat_token(*token) | {"top_logprobs": []} for token in zip(texts, logprobs, strict=True)]
    return {"content": tokens, "refusal": None}


def _chat_token(text: str, logprob: float | None) -> Body:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _end(finish: str, stop_reason: int | str | None) -> Body:
    return {"finish_reason": finish or None, "stop_reason": stop_reason}


def error_body(status: int, message: str, param: str | None = None) -> Body:
    """``param`` names the field of the request that is wrong."""
    kind = _ERROR_TYPES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def model_list(model: str, created: int, max_model_len: int) -> Body:
    card = {
        "id": model,
        "object": "model",
        "created": created,
        "owned_by": "regrow",
        "root": model,
        "parent": None,
        "max_model_len": max_model_len,
    }
    return {"object": "list", "data": [card]}
