"""A request's choices: ``n`` for each prompt, each generated as a request of its own.

Choice i of a prompt has the seed + i; choices are numbered through, those of the first prompt first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.messages import Sampling
from services.router.api_error import ApiError
from services.router.model_limits import ModelLimits
from services.router.request_parsing import ParsedRequest


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, and the text that ``echo`` gives back."""

    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Choice:
    prompt: Prompt
    sampling: Sampling


def plan_choices(
    parsed: ParsedRequest,
    prompts: Sequence[Prompt],
    limits: ModelLimits,
    max_choices: int,
    draw_seed: Callable[[], int],
) -> list[Choice]:
    """Raises ApiError, also when there are more choices than the router takes requests."""
    num_choices = parsed.n * len(prompts)
    if num_choices > max_choices:
        field = "n" if parsed.n > 1 else parsed.prompt_field
        raise ApiError(400, f"{field}: {num_choices} choices, this server has room for {max_choices}", field)
    choices = []
    for prompt in prompts:
        seed = draw_seed()
        for number in range(parsed.n):
            choices.append(Choice(prompt, parsed.sampling(limits, len(prompt.ids), seed, number)))
    return choices
