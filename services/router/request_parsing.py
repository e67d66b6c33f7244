"""JSON body in, checked request out. Whatever is wrong is an `ApiError` that names the field.

Unknown fields are ignored, as OpenAI-compatible servers do, since clients send many. Known ones that would change the
answer and are not implemented are refused, unless they have the value that changes nothing.
"""

from dataclasses import dataclass

import msgspec

from common.messages import Sampling
from services.router.api_error import ApiError
from services.router.json_fields import JsonFields, wrong
from services.router.model_limits import ModelLimits
from services.router.prompt_parsing import Message, parse_messages, parse_prompts
from services.router.sampling_parsing import parse_sampling

_MAX_STOPS = 16
_MAX_CHOICES = 128
_SEED_MASK = (1 << 64) - 1
_COMPLETION_MAX_TOKENS = 16  # default of /v1/completions

# Accepted only as what changes nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "suffix": ("",),
    "prompt_logprobs": (0,),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
}
_NEUTRAL_IN_CHATS: dict[str, tuple[object, ...]] = {**_NEUTRAL, "echo": (False,)}
_NEUTRAL_IN_COMPLETIONS: dict[str, tuple[object, ...]] = {**_NEUTRAL, "top_logprobs": (0,)}


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """``prompts`` are those of a completion, ``messages`` those of a chat. ``template`` lacks seed and max_tokens."""

    chat: bool
    prompts: tuple[str | tuple[int, ...], ...]
    messages: list[Message]
    n: int
    max_tokens: int | None  # None = not given; 0 = only the prompt is wanted back
    seed: int | None
    template: Sampling
    stops: tuple[str, ...]
    echo: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool  # in every chunk

    @property
    def prompt_field(self) -> str:
        return "messages" if self.chat else "prompt"

    def sampling(self, limits: ModelLimits, num_prompt_tokens: int, drawn_seed: int, choice: int = 0) -> Sampling:
        """Of one of the ``n`` choices of a prompt. Raises ApiError when prompt and answer do not fit together."""
        room = limits.max_model_len - num_prompt_tokens
        if num_prompt_tokens == 0:
            raise ApiError(400, f"{self.prompt_field} must not be empty", self.prompt_field)
        context = f"this model's maximum context length is {limits.max_model_len} tokens"
        if room < 1:
            raise ApiError(
                400, f"{context}; the prompt alone has {num_prompt_tokens}, please shorten it", self.prompt_field
            )
        if self.max_tokens is not None and self.max_tokens > room:
            asked = f"the prompt has {num_prompt_tokens} and max_tokens asks for {self.max_tokens} more"
            raise ApiError(400, f"{context}; {asked}", "max_tokens")
        default = room if self.chat else min(_COMPLETION_MAX_TOKENS, room)
        max_tokens = default if self.max_tokens is None else self.max_tokens
        if self.template.min_tokens > max_tokens:
            raise ApiError(
                400, f"min_tokens is {self.template.min_tokens}, more than the {max_tokens} of max_tokens", "min_tokens"
            )
        seed = drawn_seed if self.seed is None else self.seed
        # A request for the prompt alone is one for a token that nobody is shown.
        return msgspec.structs.replace(self.template, seed=(seed + choice) & _SEED_MASK, max_tokens=max(max_tokens, 1))


def parse_request(body: bytes, chat: bool, limits: ModelLimits) -> ParsedRequest:
    """Raises ApiError."""
    fields = JsonFields.of_body(body)
    fields.check_model(limits)
    fields.refuse_unless(_NEUTRAL_IN_CHATS if chat else _NEUTRAL_IN_COMPLETIONS)
    stream, echo = fields.boolean("stream", False), fields.boolean("echo", False)
    seed = fields.whole_number("seed", None, None)
    include_usage, continuous_usage = _usage_options(fields, stream)
    return ParsedRequest(
        chat=chat,
        prompts=() if chat else parse_prompts(fields, limits),
        messages=parse_messages(fields) if chat else [],
        n=_num_choices(fields),
        max_tokens=_max_tokens(fields, least=0 if echo else 1),
        seed=None if seed is None else seed & _SEED_MASK,
        template=parse_sampling(fields, chat, echo, limits),
        stops=_stops(fields),
        echo=echo,
        stream=stream,
        include_usage=include_usage,
        continuous_usage=continuous_usage,
    )


def _num_choices(fields: JsonFields) -> int:
    n = fields.whole_number("n", 1, _MAX_CHOICES)
    n = 1 if n is None else n
    if fields.whole_number("best_of", 1, None) not in (None, n):
        raise ApiError(400, "best_of is not supported here; leave it out or set it to n", "best_of")
    return n


def _max_tokens(fields: JsonFields, least: int) -> int | None:
    max_tokens = fields.whole_number("max_tokens", least, None)
    newer = fields.whole_number("max_completion_tokens", least, None)
    return max_tokens if newer is None else newer


def _stops(fields: JsonFields) -> tuple[str, ...]:
    value = fields.get("stop")
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise wrong("stop", "a string or a list of strings", value)
    if not all(stops):
        raise ApiError(400, "stop must not contain an empty string", "stop")
    if len(stops) > _MAX_STOPS:
        raise ApiError(400, f"stop must not have more than {_MAX_STOPS} strings, got {len(stops)}", "stop")
    return tuple(stops)


def _usage_options(fields: JsonFields, stream: bool) -> tuple[bool, bool]:
    """(include_usage, continuous_usage_stats); the latter means nothing without the former."""
    if fields.get("stream_options") is None:
        return False, False
    options = fields.table("stream_options")
    if not stream:
        raise ApiError(400, "stream_options needs stream to be true", "stream_options")
    include, continuous = options.boolean("include_usage", False), options.boolean("continuous_usage_stats", False)
    return include, include and continuous
