"""What a request says about how its tokens are chosen."""

from common.messages import Sampling
from common.sampling_bounds import MAX_BIAS, REPETITION_PENALTIES
from services.router.api_error import ApiError
from services.router.json_fields import JsonFields, wrong
from services.router.model_limits import ModelLimits

_MAX_COMPLETION_LOGPROBS = 5
_MAX_CHAT_LOGPROBS = 20
_MAX_PENALTY = 2.0


def parse_sampling(fields: JsonFields, chat: bool, echo: bool, limits: ModelLimits) -> Sampling:
    """All but ``seed`` and ``max_tokens``, which depend on choice and prompt. Raises ApiError."""
    top_k = fields.whole_number("top_k", -1, None)
    num_top_logprobs = _chat_logprobs(fields) if chat else fields.whole_number("logprobs", 0, _MAX_COMPLETION_LOGPROBS)
    return Sampling(
        temperature=fields.number("temperature", 0.0, 2.0, limits.temperature),
        top_p=_top_p(fields, limits),
        top_k=limits.top_k if top_k is None else min(max(top_k, 0), limits.vocab_size),
        seed=0,
        max_tokens=0,
        ignore_eos=fields.boolean("ignore_eos", False),
        logprobs=num_top_logprobs is not None,
        stop_token_ids=limits.eos_token_ids,
        extra_stop_token_ids=tuple(dict.fromkeys(fields.token_ids("stop_token_ids", limits))),
        min_tokens=fields.whole_number("min_tokens", 0, None) or 0,
        min_p=fields.number("min_p", 0.0, 1.0, 0.0),
        presence_penalty=fields.number("presence_penalty", -_MAX_PENALTY, _MAX_PENALTY, 0.0),
        frequency_penalty=fields.number("frequency_penalty", -_MAX_PENALTY, _MAX_PENALTY, 0.0),
        repetition_penalty=fields.number("repetition_penalty", *REPETITION_PENALTIES, 1.0),
        logit_bias=_logit_bias(fields, limits),
        num_top_logprobs=num_top_logprobs or 0,
        prompt_logprobs=echo and num_top_logprobs is not None,
    )


def _chat_logprobs(fields: JsonFields) -> int | None:
    """The number of alternatives, None when log-probabilities are not wanted at all."""
    num_top = fields.whole_number("top_logprobs", 0, _MAX_CHAT_LOGPROBS)
    if fields.boolean("logprobs", False):
        return num_top or 0
    if num_top:
        raise ApiError(400, "top_logprobs needs logprobs to be true", "top_logprobs")
    return None


def _logit_bias(fields: JsonFields, limits: ModelLimits) -> tuple[tuple[int, float], ...]:
    table = fields.table("logit_bias")
    biases: dict[int, float] = {}
    for key, bias in table.items():
        if not (key.isascii() and key.isdigit() and len(key) < 20 and int(key) < limits.vocab_size):
            raise wrong("logit_bias", f"an object whose keys are token ids below {limits.vocab_size}", key)
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -MAX_BIAS <= bias <= MAX_BIAS:
            raise wrong("logit_bias", f"an object of numbers between {-MAX_BIAS:g} and {MAX_BIAS:g}", bias)
        biases[int(key)] = float(bias)
    return tuple(sorted(biases.items()))


def _top_p(fields: JsonFields, limits: ModelLimits) -> float:
    top_p = fields.number("top_p", 0.0, 1.0, limits.top_p)
    if top_p == 0.0:
        raise ApiError(400, "top_p must be greater than 0 and at most 1", "top_p")
    return top_p
