"""One output token of a request: what its parameters do to the logits, the draw, and what is reported of it.

A pure function of the logits, the parameters and all tokens so far, so a request that goes on elsewhere goes on
exactly. In this order: logit_bias is added; ids that would stop the request too early are taken out; repetition, then
frequency and presence penalties; then `sampling` (temperature, min_p, top_k, top_p). The penalties are those of vLLM:
repetition looks at prompt and outputs, the other two at the outputs alone. Reported log-probabilities are those of
the model, before any of this. numpy only.

Legend: R rows, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from common.messages import Sampling, TopLogprobs
from common.model.sampling import Draw, sample_rows


class TokenChoice(NamedTuple):
    """``top``: the likeliest tokens, as many as the request asks for, the chosen one among them or not."""

    token: int
    logprob: float
    top: TopLogprobs = ()


class Choosing(NamedTuple):
    """What one row is for: output number ``len(outputs)`` of a request."""

    sampling: Sampling
    prompt: Sequence[int]
    outputs: Sequence[int]


def choose(
    logits_V: npt.NDArray[np.float32], sampling: Sampling, prompt: Sequence[int], outputs: Sequence[int]
) -> TokenChoice:
    """Output number ``len(outputs)``. Raises ValueError when the logits are not finite."""
    return choose_rows(logits_V[None], [Choosing(sampling, prompt, outputs)])[0]


def choose_rows(logits_RV: npt.NDArray[np.float32], rows: Sequence[Choosing]) -> list[TokenChoice]:
    """`choose` of each row, all in one pass; a row has the same bits whatever rows stand beside it."""
    adjusted = {}
    for number, (row, logits_V) in enumerate(zip(rows, logits_RV, strict=True)):
        if (adjusted_V := adjust(logits_V, *row)) is not logits_V:
            adjusted[number] = adjusted_V
    drawn_RV = logits_RV
    if adjusted:
        drawn_RV = logits_RV.copy()
        for number, adjusted_V in adjusted.items():
            drawn_RV[number] = adjusted_V
    choices = []
    for number, (row, (token, logprob)) in enumerate(
        zip(rows, sample_rows(drawn_RV, [_draw_of(row) for row in rows]), strict=True)
    ):
        num_top = row.sampling.num_top_logprobs
        if number in adjusted or num_top:
            choices.append(TokenChoice(token, *token_logprobs(logits_RV[number], token, num_top)))
        else:
            choices.append(TokenChoice(token, logprob))
    return choices


def _draw_of(row: Choosing) -> Draw:
    sampling = row.sampling
    return Draw(sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p, sampling.seed, len(row.outputs))


def adjust(
    logits_V: npt.NDArray[np.float32], sampling: Sampling, prompt: Sequence[int], outputs: Sequence[int]
) -> npt.NDArray[np.float32]:
    """The logits to draw output number ``len(outputs)`` from: ``logits_V`` itself when nothing asks for a change."""
    bans = [id for id in sampling.stop_ids if id < len(logits_V)] if len(outputs) < sampling.min_tokens else []
    repeats = sampling.repetition_penalty
    frequency, presence = sampling.frequency_penalty, sampling.presence_penalty
    if not bans and not sampling.logit_bias and (repeats, frequency, presence) == (1.0, 0.0, 0.0):
        return logits_V
    adjusted = logits_V.astype(np.float64)
    for id, bias in sampling.logit_bias:
        adjusted[id] += bias
    adjusted[bans] = -np.inf
    if repeats != 1.0:
        seen = np.unique(np.array([*prompt, *outputs], dtype=np.int64))
        adjusted[seen] = np.where(adjusted[seen] > 0, adjusted[seen] / repeats, adjusted[seen] * repeats)
    if outputs:
        made, counts = np.unique(np.array(outputs, dtype=np.int64), return_counts=True)
        adjusted[made] -= counts * frequency + presence
    # A request whose stop ids are the whole vocabulary bans everything: then nothing is banned.
    return adjusted.astype(np.float32) if np.isfinite(adjusted.max()) else logits_V


def token_logprobs(logits_V: npt.NDArray[np.float32], token: int, num_top: int) -> tuple[float, TopLogprobs]:
    """Log-probabilities of ``token`` and of the ``num_top`` likeliest tokens (of equal ones the lower id first)."""
    shifted = logits_V.astype(np.float64)
    shifted -= shifted.max()
    log_total = -sample_rows(logits_V[None], [Draw(0.0)])[0][1]  # the likeliest token's
    top: list[int] = []
    if num_top > 0:
        num_top = min(num_top, len(shifted))
        least = np.partition(shifted, len(shifted) - num_top)[len(shifted) - num_top]
        candidates = np.flatnonzero(shifted >= least)
        top = candidates[np.argsort(-shifted[candidates], kind="stable")][:num_top].tolist()
    return float(shifted[token]) - log_total, tuple((id, float(shifted[id]) - log_total) for id in top)


def prompt_logprobs(
    logits_SV: npt.NDArray[np.float32], sampling: Sampling, prompt: Sequence[int], start: int
) -> list[tuple[float, TopLogprobs]]:
    """`token_logprobs` of the prompt tokens that follow positions start, start + 1, ..., whose logits these are."""
    followers = prompt[start + 1 : start + 1 + len(logits_SV)]  # nothing follows the last one
    return [
        token_logprobs(logits_V, token, sampling.num_top_logprobs)
        for token, logits_V in zip(followers, logits_SV, strict=False)
    ]
