"""Whether sampling parameters can be computed with. Pure.

Routers tell clients more exactly what is wrong. This check stands before the tensors of whoever computes: a request
that made one process fail would be placed again, and take the next one down.
"""

import math
from collections.abc import Iterator

from common.messages import Sampling

# Beyond these a logit could leave what fp32 can hold.
MAX_BIAS = 100.0
REPETITION_PENALTIES = (0.01, 100.0)


def sampling_fault(sampling: Sampling, vocab_size: int) -> str:
    """The first parameter that is out of bounds, "" if there is none."""
    return next((f"{name} is out of bounds" for name, is_sound in _checks(sampling, vocab_size) if not is_sound), "")


def _checks(sampling: Sampling, vocab_size: int) -> Iterator[tuple[str, bool]]:
    """Comparisons are written so that nan fails them."""
    least, most = REPETITION_PENALTIES
    yield "temperature", 0.0 <= sampling.temperature < math.inf
    yield "top_p", 0.0 <= sampling.top_p <= 1.0
    yield "min_p", 0.0 <= sampling.min_p <= 1.0
    yield "presence_penalty", abs(sampling.presence_penalty) <= MAX_BIAS
    yield "frequency_penalty", abs(sampling.frequency_penalty) <= MAX_BIAS
    yield "repetition_penalty", least <= sampling.repetition_penalty <= most
    yield "logit_bias", all(0 <= id < vocab_size and abs(bias) <= MAX_BIAS for id, bias in sampling.logit_bias)
    yield "stop_token_ids", min(sampling.stop_ids, default=0) >= 0
