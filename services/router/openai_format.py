"""Bodies of the OpenAI API as plain dicts: completions, chat completions, their chunks, errors, model cards.

Fields and their order are those of the OpenAI documentation; errors carry the HTTP status as ``code``, as vLLM's do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A chosen token as shown to a client, and the natural logarithm of its probability."""

    text: str
    logprob: float


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

    def body(self, object_name: str, choices: list[Body]) -> Body:
        return {
            "id": self.id,
            "object": object_name,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def whole_response(
    head: ResponseHead, text: str, finish: str, logprobs: Sequence[TokenLogprob] | None, usage: Usage
) -> Body:
    """The answer to a request without ``stream``; ``logprobs`` None = not asked for."""
    if head.chat:
        choice: Body = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None if logprobs is None else chat_logprobs(logprobs),
            "finish_reason": finish,
        }
        body = head.body("chat.completion", [choice])
    else:
        choice = {
            "index": 0,
            "text": text,
            "logprobs": None if logprobs is None else completion_logprobs(logprobs, 0),
            "finish_reason": finish,
        }
        body = head.body("text_completion", [choice])
    body["usage"] = usage.body()
    return body


def role_chunk(head: ResponseHead) -> Body:
    """The first chunk of a chat stream."""
    return _chat_chunk(head, {"role": "assistant", "content": ""}, None, None)


def chunk(
    head: ResponseHead, text: str, finish: str, logprobs: Sequence[TokenLogprob] | None, text_offset: int
) -> Body:
    """``text_offset``: characters of the tokens that earlier chunks had."""
    if head.chat:
        return _chat_chunk(
            head, {"content": text}, finish or None, None if logprobs is None else chat_logprobs(logprobs)
        )
    choice: Body = {
        "index": 0,
        "text": text,
        "logprobs": None if logprobs is None else completion_logprobs(logprobs, text_offset),
        "finish_reason": finish or None,
    }
    return head.body("text_completion", [choice])


def usage_chunk(head: ResponseHead, usage: Usage) -> Body:
    """The last chunk when ``stream_options.include_usage`` is set."""
    body = head.body("chat.completion.chunk" if head.chat else "text_completion", [])
    body["usage"] = usage.body()
    return body


def completion_logprobs(tokens: Sequence[TokenLogprob], text_offset: int) -> Body:
    """The legacy format: parallel lists. Only the chosen token is known, so it is its own list of alternatives."""
    offsets = []
    for token in tokens:
        offsets.append(text_offset)
        text_offset += len(token.text)
    return {
        "text_offset": offsets,
        "token_logprobs": [token.logprob for token in tokens],
        "tokens": [token.text for token in tokens],
        "top_logprobs": [{token.text: token.logprob} for token in tokens],
    }


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> Body:
    content = [
        {"token": token.text, "logprob": token.logprob, "bytes": list(token.text.encode()), "top_logprobs": []}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


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


def _chat_chunk(head: ResponseHead, delta: Body, finish: str | None, logprobs: Body | None) -> Body:
    choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
    return head.body("chat.completion.chunk", [choice])
