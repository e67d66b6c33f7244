"""Requests: placed, answered, asked about, ended. Any message may come late, twice or never."""

import msgspec

from common.ids import Epoch, Incarnation, ProcessId, Rank, RequestId
from common.messages.tagged import TaggedStruct


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """Everything that decides a token besides the logits. Carried whole: a replaced request goes on exactly."""

    temperature: float
    top_p: float
    top_k: int  # 0 = off
    seed: int  # always set: the router draws one for requests without
    max_tokens: int
    ignore_eos: bool = False
    logprobs: bool = False
    stop_token_ids: tuple[int, ...] = ()  # end-of-sequence ids of the model; ``ignore_eos`` switches them off
    extra_stop_token_ids: tuple[int, ...] = ()  # the request's own: they stop whatever ``ignore_eos`` says
    min_tokens: int = 0  # no stop before this many outputs
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    num_top_logprobs: int = 0  # likeliest tokens to report with each output
    prompt_logprobs: bool = False  # of each prompt token too; they come with output 0

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """All token ids that end this request."""
        return self.extra_stop_token_ids + (() if self.ignore_eos else self.stop_token_ids)


TopLogprobs = tuple[tuple[int, float], ...]  # (token id, log-probability), the likeliest first


class Announce(TaggedStruct, frozen=True):
    """router -> decode: expect KV for this attempt, or compute it. Nothing else makes a rank accept KV."""

    request: RequestId
    attempt: int
    router: ProcessId
    incarnation: Incarnation  # of the rank that is meant
    prompt: tuple[int, ...]
    outputs: tuple[int, ...]  # tokens that the client has already
    sampling: Sampling
    computes_prompt: bool = False  # no prefill worker is left: the rank computes prompt + outputs itself, in its rounds
    reserves_all: bool = False  # was preempted before: wait for KV blocks for the whole length, and never again


class Tokens(msgspec.Struct, frozen=True, array_like=True):
    """Outputs [start, start + len(ids)) of one attempt. ``finish``: "" (goes on), "stop" or "length".

    ``top_logprobs`` has an entry for each id if the request asks for them. ``prompt_logprobs``, if it asks for those,
    are of prompt tokens 1, 2, ... and come with output 0, so that whoever has that output has them too.
    ``missed_experts``: some token of this attempt was computed without an expert that it was routed to.
    """

    request: RequestId
    attempt: int
    start: int
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str = ""
    top_logprobs: tuple[TopLogprobs, ...] = ()
    prompt_logprobs: tuple[tuple[float, TopLogprobs], ...] = ()
    missed_experts: bool = False


class TokenBatch(TaggedStruct, frozen=True):
    """decode -> router: what was committed for the requests of that router since it was told last."""

    rank: Rank
    incarnation: Incarnation
    epoch: Epoch
    items: tuple[Tokens, ...]
    num_running: int = 0
    num_free_blocks: int = 0


class Have(TaggedStruct, frozen=True):
    """router -> decode: I have ``num_outputs`` outputs of this attempt; send all from there, or Unknown."""

    request: RequestId
    attempt: int
    num_outputs: int


class Unknown(TaggedStruct, frozen=True):
    """decode or prefill -> router: nothing known of this attempt."""

    request: RequestId
    attempt: int


class Refused(TaggedStruct, frozen=True):
    """prefill or decode -> router: this attempt ends here; place it again (or elsewhere)."""

    request: RequestId
    attempt: int
    reason: str
    preempted: bool = False  # it ran, and had to make room for older ones


class Abort(TaggedStruct, frozen=True):
    """router -> prefill, decode: drop this and all earlier attempts."""

    request: RequestId
    attempt: int


class Release(TaggedStruct, frozen=True):
    """router -> decode: the finished request was delivered; forget it."""

    request: RequestId
    attempt: int
