"""JSON body in, checked request out. Whatever is wrong is an `ApiError` that names the field.

Unknown fields are ignored, as OpenAI-compatible servers do, since clients send many. Known ones that would change the
answer and are not implemented are refused, unless they have the value that changes nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from common.messages import Sampling

_MAX_STOPS = 16
_SEED_MASK = (1 << 64) - 1
_COMPLETION_MAX_TOKENS = 16  # default of /v1/completions

# Accepted only as what changes nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "logit_bias": ({},),
    "stop_token_ids": ([],),
    "top_logprobs": (0,),
    "prompt_logprobs": (0,),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
}


class ApiError(Exception):
    """An answer to the client that is no completion. ``param`` names the field at fault, if one is."""

    def __init__(self, status: int, message: str, param: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.retry_after_s = status, message, param, retry_after_s


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What requests are checked against. ``temperature`` and so on are the defaults of the model's directory."""

    name: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """``prompt`` is text, token ids, or chat messages; ``sampling`` lacks only what depends on the prompt's length."""

    chat: bool
    prompt: str | tuple[int, ...] | list[dict[str, Any]]
    max_tokens: int | None  # None = not given
    seed: int | None
    temperature: float
    top_p: float
    top_k: int
    ignore_eos: bool
    logprobs: bool
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool

    @property
    def prompt_field(self) -> str:
        return "messages" if self.chat else "prompt"

    def sampling(self, limits: ModelLimits, num_prompt_tokens: int, drawn_seed: int) -> Sampling:
        """Raises ApiError when prompt and answer do not fit into the context together."""
        room = limits.max_model_len - num_prompt_tokens
        if num_prompt_tokens == 0:
            raise ApiError(400, f"{self.prompt_field} must not be empty", self.prompt_field)
        if room < 1:
            raise ApiError(
                400,
                f"this model's maximum context length is {limits.max_model_len} tokens; the prompt alone has "
                f"{num_prompt_tokens}, please shorten it",
                self.prompt_field,
            )
        if self.max_tokens is not None and self.max_tokens > room:
            raise ApiError(
                400,
                f"this model's maximum context length is {limits.max_model_len} tokens; the prompt has "
                f"{num_prompt_tokens} and max_tokens asks for {self.max_tokens} more",
                "max_tokens",
            )
        default = room if self.chat else min(_COMPLETION_MAX_TOKENS, room)
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=drawn_seed if self.seed is None else self.seed,
            max_tokens=default if self.max_tokens is None else self.max_tokens,
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs,
            stop_token_ids=limits.eos_token_ids,
        )


def parse_request(body: bytes, chat: bool, limits: ModelLimits) -> ParsedRequest:
    """Raises ApiError."""
    fields = _Fields(_json_object(body))
    model = fields.text("model", limits.name)
    if model != limits.name:
        raise ApiError(404, f"the model {model!r} does not exist; this server has {limits.name!r}", "model")
    fields.refuse_unsupported()
    stream = fields.boolean("stream", False)
    max_tokens = fields.whole_number("max_tokens", 1, None)
    newer_max_tokens = fields.whole_number("max_completion_tokens", 1, None)
    seed = fields.whole_number("seed", None, None)
    top_k = fields.whole_number("top_k", -1, None)
    return ParsedRequest(
        chat=chat,
        prompt=_messages(fields) if chat else _prompt(fields, limits),
        max_tokens=max_tokens if newer_max_tokens is None else newer_max_tokens,
        seed=None if seed is None else seed & _SEED_MASK,
        temperature=fields.number("temperature", 0.0, 2.0, limits.temperature),
        top_p=_top_p(fields, limits),
        top_k=limits.top_k if top_k is None else min(max(top_k, 0), limits.vocab_size),
        ignore_eos=fields.boolean("ignore_eos", False),
        logprobs=fields.boolean("logprobs", False) if chat else fields.whole_number("logprobs", 0, 5) is not None,
        stops=_stops(fields),
        stream=stream,
        include_usage=_include_usage(fields, stream),
    )


class _Fields:
    """Typed access to a JSON object; null counts as absent. Every method raises ApiError that names the field."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def get(self, name: str) -> Any:
        return self._values.get(name)

    def text(self, name: str, default: str) -> str:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise _wrong(name, "a string", value)
        return value

    def boolean(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise _wrong(name, "true or false", value)
        return value

    def whole_number(self, name: str, least: int | None, most: int | None) -> int | None:
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise _wrong(name, "a whole number", value)
        if (least is not None and value < least) or (most is not None and value > most):
            raise _wrong(name, f"at least {least}" if most is None else f"between {least} and {most}", value)
        return value

    def number(self, name: str, least: float, most: float, default: float) -> float:
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong(name, "a number", value)
        if not least <= value <= most:
            raise _wrong(name, f"between {least:g} and {most:g}", value)
        return float(value)

    def refuse_unsupported(self) -> None:
        for name, neutral in _NEUTRAL.items():
            value = self.get(name)
            # Booleans are numbers in Python, but not in JSON.
            same_kind = [one for one in neutral if isinstance(one, bool) == isinstance(value, bool)]
            if value is None or value in same_kind:
                continue
            shown = msgspec.json.encode(neutral[0]).decode()
            raise ApiError(400, f"{name} is not supported yet; leave it out or set it to {shown}", name)


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    return value


def _prompt(fields: _Fields, limits: ModelLimits) -> str | tuple[int, ...]:
    value = fields.get("prompt")
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _wrong("prompt", "a string or a list of token ids", value)
    if len(value) > 1 and all(isinstance(item, str | list) for item in value):
        raise ApiError(400, "several prompts in one request are not supported yet; send one each", "prompt")
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int):
            raise _wrong("prompt", "a string or a list of token ids", item)
        if not 0 <= item < limits.vocab_size:
            raise ApiError(400, f"prompt: token id {item} is not between 0 and {limits.vocab_size - 1}", "prompt")
    return tuple(value)


def _messages(fields: _Fields) -> list[dict[str, Any]]:
    value = fields.get("messages")
    if not isinstance(value, list) or not value:
        raise _wrong("messages", "a list of at least one message", value)
    return [_message(number, message) for number, message in enumerate(value)]


def _message(number: int, message: object) -> dict[str, Any]:
    """The message with its content as one string: parts of type "text" are joined by line ends."""
    where = f"messages[{number}]"
    if not isinstance(message, dict):
        raise ApiError(400, f"{where} must be an object with role and content", "messages")
    if not isinstance(message.get("role"), str):
        raise ApiError(400, f"{where}.role must be a string", "messages")
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(texts) != len(content) or not all(isinstance(text, str) for text in texts):
            raise ApiError(400, f'{where}.content: only parts of type "text" are supported', "messages")
        content = "\n".join(str(text) for text in texts)
    if not isinstance(content, str) and not (content is None and message["role"] == "assistant"):
        raise ApiError(400, f"{where}.content must be a string or a list of text parts", "messages")
    return {**message, "content": content or ""}


def _top_p(fields: _Fields, limits: ModelLimits) -> float:
    top_p = fields.number("top_p", 0.0, 1.0, limits.top_p)
    if top_p == 0.0:
        raise ApiError(400, "top_p must be greater than 0 and at most 1", "top_p")
    return top_p


def _stops(fields: _Fields) -> tuple[str, ...]:
    value = fields.get("stop")
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise _wrong("stop", "a string or a list of strings", value)
    if not all(stops):
        raise ApiError(400, "stop must not contain an empty string", "stop")
    if len(stops) > _MAX_STOPS:
        raise ApiError(400, f"stop must not have more than {_MAX_STOPS} strings, got {len(stops)}", "stop")
    return tuple(stops)


def _include_usage(fields: _Fields, stream: bool) -> bool:
    options = fields.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise _wrong("stream_options", "an object", options)
    if not stream:
        raise ApiError(400, "stream_options needs stream to be true", "stream_options")
    return _Fields(options).boolean("include_usage", False)


def _wrong(name: str, wanted: str, value: object) -> ApiError:
    shown = msgspec.json.encode(value).decode()
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return ApiError(400, f"{name} must be {wanted}, got {shown}", name)
