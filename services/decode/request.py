"""One request on a decode rank: what it has computed, and what comes next. Pure.

Positions 0..num_computed-1 have KV. What is left of prompt and outputs is computed by the next steps: of a request that
decodes that is its last output, of one whose prompt is computed here it is the rest of the prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import msgspec

from common.ids import RequestId
from common.messages import Announce, KvHandoff, Sampling, Tokens, TopLogprobs
from common.model.token_choice import TokenChoice
from services.decode.kv_pieces import KvPiece, KvPieces

PromptLogprobs = tuple[tuple[float, TopLogprobs], ...]


class Stage(Enum):
    ANNOUNCED = "announced"
    HELD = "held"  # waits for blocks; its KV, if it needs any, is here
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What the model and this rank's memory allow."""

    vocab_size: int
    max_positions: int
    kv_bytes_per_token: int  # over all layers
    num_kv_layers: int = 1


class Step(msgspec.Struct, frozen=True):
    """One running request's part in a round: compute ``token_ids`` at ``position``, ``position`` + 1, ...

    ``samples``: the last one is the last that is known, so sample output ``output_index`` after it. ``outputs`` is the
    request's own list, to be read before the next `commit`. ``judges_prompt``: log-probabilities of what follows each
    of the tokens in the prompt are wanted.
    """

    request: RequestId
    token_ids: tuple[int, ...]
    position: int
    output_index: int
    sampling: Sampling
    block_table: tuple[int, ...]
    prompt: tuple[int, ...] = ()
    outputs: Sequence[int] = ()
    samples: bool = True
    judges_prompt: bool = False

    @property
    def stop(self) -> int:
        """The position behind its last token."""
        return self.position + len(self.token_ids)


class Computed(msgspec.Struct, frozen=True):
    """What came of a step: the sampled token, if it samples, and log-probabilities of the prompt, if it judges that.
    ``missed_experts``: one of its tokens was routed to an expert without live copy, which was left out."""

    choice: TokenChoice | None
    prompt_logprobs: PromptLogprobs = ()
    missed_experts: bool = False


@dataclass(frozen=True, slots=True)
class Admission:
    """Write this KV into these blocks before the next round."""

    request: RequestId
    pieces: tuple[KvPiece, ...]
    block_table: tuple[int, ...]


@dataclass(slots=True)
class Request:
    announce: Announce
    max_outputs: int
    since: float
    ids: list[int]
    kv: KvPieces
    handoff: KvHandoff | None = None  # the end of the KV has come, at `since`; pieces may still be missing
    logprobs: list[float] = field(default_factory=list)  # of the outputs that are no announced ones
    tops: list[TopLogprobs] = field(default_factory=list)  # of the same, if asked for
    prompt_logprobs: PromptLogprobs = ()
    stage: Stage = Stage.ANNOUNCED
    finish: str = ""
    repeat_at: float = 0.0
    num_computed: int = 0
    missed_experts: bool = False  # once is for ever: what comes later attends to it

    @property
    def num_context_tokens(self) -> int:
        """What the request came with."""
        return len(self.announce.prompt) + len(self.announce.outputs)

    @property
    def num_known_tokens(self) -> int:
        return len(self.announce.prompt) + len(self.ids)

    @property
    def num_left(self) -> int:
        """Tokens to compute before the next one can be sampled: 1 for a request that decodes."""
        return self.num_known_tokens - self.num_computed

    def step(self, block_table: tuple[int, ...], most: int) -> Step:
        """The next at most ``most`` tokens."""
        announce, ids, start = self.announce, self.ids, self.num_computed
        num_prompt, stop = len(announce.prompt), min(start + most, self.num_known_tokens)
        tokens = announce.prompt[start:stop] + tuple(ids[max(0, start - num_prompt) : max(0, stop - num_prompt)])
        judges = announce.sampling.prompt_logprobs and not announce.outputs and start < num_prompt
        samples = stop == self.num_known_tokens
        return Step(
            announce.request,
            tokens,
            start,
            len(ids),
            announce.sampling,
            block_table,
            announce.prompt,
            ids,
            samples,
            judges,
        )

    def append(self, token: int, logprob: float, top: TopLogprobs) -> None:
        sampling = self.announce.sampling
        self.ids.append(token)
        self.logprobs.append(logprob)
        if sampling.num_top_logprobs:
            self.tops.append(top)
        if token in sampling.stop_ids and len(self.ids) > sampling.min_tokens:
            self.finish = "stop"
        elif len(self.ids) >= self.max_outputs:
            self.finish = "length"

    def tokens(self, start: int) -> Tokens:
        """What a router is told: the outputs from number ``start`` on."""
        first = start - len(self.announce.outputs)
        return Tokens(
            self.announce.request,
            self.announce.attempt,
            start,
            tuple(self.ids[start:]),
            tuple(self.logprobs[first:]),
            self.finish,
            tuple(self.tops[first:]),
            self.prompt_logprobs if start == 0 else (),
            self.missed_experts,
        )

    def check_invariants(self) -> None:
        assert len(self.ids) == len(self.announce.outputs) + len(self.logprobs) <= max(self.max_outputs, 1)
        assert bool(self.finish) == (self.stage is Stage.FINISHED)
        assert self.num_computed <= self.num_known_tokens
        assert self.stage is not Stage.RUNNING or self.num_computed < self.num_known_tokens, "nothing left to compute"
