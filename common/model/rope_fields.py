"""Rotary positions in config.json: `rope_theta` with `rope_scaling`, or transformers 5's `rope_parameters`."""

import math

from common.model.architecture import Rope, Yarn
from common.model.json_fields import JsonFields

_SPELLINGS = ("rope_parameters", "rope_scaling")


def read_rope(fields: JsonFields, scales_scores: bool) -> Rope:
    """``scales_scores``: the family's `mscale_all_dim` acts on the attention scores (DeepSeek)."""
    given = [(name, value) for name in _SPELLINGS if (value := fields.take(name)) is not None]
    if len(given) > 1:
        raise fields.error("rope_scaling", "and rope_parameters say the same thing; only one may be there")
    theta = fields.number("rope_theta", default=10000.0)
    if not given:
        return Rope(_checked_theta(fields, theta))
    name, value = given[0]
    if not isinstance(value, dict):
        raise fields.error(name, f"must be an object, got {value!r}")
    scaling = JsonFields(value, prefix=f"config: {name}.")
    theta = _checked_theta(scaling, scaling.number("rope_theta", default=theta))
    kind_field = "rope_type" if "rope_type" in scaling else "type"
    kind = scaling.choice(kind_field, "default", "yarn")
    scaling.choice("type", kind)  # some files have both
    yarn = _read_yarn(scaling, scales_scores) if kind == "yarn" else None
    if scaling.left:
        unknown = min(scaling.left)
        raise scaling.error(unknown, f"= {scaling.left[unknown]!r} is not a known field of rope_type {kind!r}")
    return Rope(theta, yarn)


def _checked_theta(fields: JsonFields, theta: float) -> float:
    if theta <= 1:
        raise fields.error("rope_theta", f"must be more than 1, got {theta:g}")
    return theta


def _read_yarn(scaling: JsonFields, scales_scores: bool) -> Yarn:
    factor = scaling.number("factor", at_least=1.0)
    beta_fast = scaling.number("beta_fast", default=32.0)
    beta_slow = scaling.number("beta_slow", default=1.0)
    if not beta_fast > beta_slow > 0:
        raise scaling.error("beta_fast", f"must be more than beta_slow, and both more than 0: {beta_fast}, {beta_slow}")
    attention_factor, score_factor = _magnitude(factor), 1.0
    if scales_scores:
        mscale = scaling.optional_number("mscale") or 0.0
        mscale_all_dim = scaling.optional_number("mscale_all_dim") or 0.0
        if mscale and mscale_all_dim:
            attention_factor = _magnitude(factor, mscale) / _magnitude(factor, mscale_all_dim)
            score_factor = _magnitude(factor, mscale_all_dim) ** 2
        elif mscale_all_dim or mscale not in (0.0, 1.0):
            # DeepSeek's own code and transformers read a lone one differently.
            raise scaling.error("mscale", "and mscale_all_dim are supported only together (or mscale 1 alone)")
    explicit = scaling.optional_number("attention_factor")
    return Yarn(
        factor=factor,
        original_max_position_embeddings=scaling.whole("original_max_position_embeddings"),
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        truncate=scaling.flag("truncate", default=True),
        attention_factor=attention_factor if explicit is None else explicit,
        score_factor=score_factor,
    )


def _magnitude(factor: float, mscale: float = 1.0) -> float:
    """By how much attention is sharpened when the context grows by `factor` (arXiv:2309.00071, section 3.4)."""
    return 0.1 * mscale * math.log(factor) + 1.0
