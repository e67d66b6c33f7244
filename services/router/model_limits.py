"""What the served model allows, and what it takes for granted."""

from dataclasses import dataclass


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
