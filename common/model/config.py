"""config.json and generation_config.json of a Hugging Face directory, checked field by field.

A field that would change the computation in a way that is not implemented, and a field that is not known at all, is a
ValueError that names it: a checkpoint is never computed as something it is not. Without torch: the router imports this.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.model.architecture import ModelConfig
from common.model.families import model_config_from_dict
from common.model.json_fields import JsonFields

__all__ = [
    "GenerationDefaults",
    "ModelConfig",
    "load_generation_defaults",
    "load_model_config",
    "model_config_from_dict",
]


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What generation_config.json says. `top_k` 0 and `top_p` 1.0 mean no filter."""

    eos_token_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


def load_model_config(directory: Path) -> ModelConfig:
    """Reads directory/config.json. Raises ValueError with one line that names the file and the field."""
    path = directory / "config.json"
    raw = _read_object(path)
    try:
        return model_config_from_dict(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_generation_defaults(directory: Path) -> GenerationDefaults:
    """Reads directory/generation_config.json; the defaults when there is no such file."""
    path = directory / "generation_config.json"
    if not path.exists():
        return GenerationDefaults()
    fields = JsonFields(_read_object(path), prefix="")
    try:
        sampled = fields.take("do_sample") is not False
        temperature = fields.number("temperature", default=1.0)
        return GenerationDefaults(
            eos_token_ids=fields.token_ids("eos_token_id"),
            temperature=temperature if sampled else 0.0,
            top_p=fields.number("top_p", default=1.0),
            top_k=fields.whole("top_k", default=0, at_least=0),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; a model directory in Hugging Face layout is needed") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: a JSON object is expected")
    return raw
