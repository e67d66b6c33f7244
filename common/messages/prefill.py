"""Prompts: computed by a prefill worker, whose KV goes straight to the decode rank."""

from common.ids import Incarnation, ProcessId, Rank, RequestId
from common.messages.requests import Sampling, TopLogprobs
from common.messages.tagged import TaggedStruct


class Prefill(TaggedStruct, frozen=True):
    """router -> prefill: compute KV of ``prompt + outputs``, sample the next token, hand both to the decode rank."""

    request: RequestId
    attempt: int
    router: ProcessId
    prompt: tuple[int, ...]
    outputs: tuple[int, ...]
    sampling: Sampling
    rank: Rank
    incarnation: Incarnation
    endpoint: str  # of the decode rank


class PrefillDone(TaggedStruct, frozen=True):
    """prefill -> router: KV pushed (which does not mean that it arrived)."""

    request: RequestId
    attempt: int


class AskPrefill(TaggedStruct, frozen=True):
    """router -> prefill after no news: is this attempt queued or running?"""

    request: RequestId
    attempt: int


class PrefillQueued(TaggedStruct, frozen=True):
    """prefill -> router: yes, ``num_ahead`` prompt tokens come first."""

    request: RequestId
    attempt: int
    num_ahead: int = 0


class KvPart(TaggedStruct, frozen=True):
    """prefill -> decode, while the prompt is still computed. One extra frame: the KV of positions start, start + 1, ...
    in some layers, float32 [num_layers, num_tokens, kv_width], C order, little endian. Any order, any number of times.
    """

    request: RequestId
    attempt: int
    rank: Rank
    incarnation: Incarnation
    first_layer: int
    num_layers: int
    start: int
    num_tokens: int


class KvHandoff(TaggedStruct, frozen=True):
    """prefill -> decode, after the last token. The KV comes in one extra frame, float32 [num_layers, num_tokens,
    kv_width], C order, little endian; without a frame it has come, or still comes, in KvParts."""

    request: RequestId
    attempt: int
    rank: Rank
    incarnation: Incarnation
    num_tokens: int
    first_token: int  # output number len(outputs)
    first_logprob: float
    first_top: TopLogprobs = ()
    prompt_logprobs: tuple[tuple[float, TopLogprobs], ...] = ()
