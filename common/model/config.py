"""What config.json and generation_config.json of a Hugging Face directory say, checked field by field.

Two spellings are read: the original DeepSeek-V3 one (`rope_theta`, `rope_scaling`, `scoring_func`, ...) and the one
that transformers 5 writes (`rope_parameters`, `rope_interleave`, ...). A field that would change the computation in a
way that is not implemented, and a field that is not known at all, is a ValueError that names it: a checkpoint
is never computed as something it is not. Without torch: the router imports this.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Accepted and without effect on the forward pass in fp32 inference.
_IGNORED_FIELDS = frozenset(
    {
        "_attn_implementation", "_commit_hash", "_name_or_path", "add_cross_attention", "architectures",
        "attention_dropout", "auto_map", "aux_loss_alpha", "bos_token_id", "chunk_size_feed_forward", "dtype",
        "ep_size", "head_dim", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder", "label2id",
        "num_key_value_heads", "num_mtp_layers", "num_nextn_predict_layers", "output_attentions",
        "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp", "problem_type",
        "qk_head_dim", "return_dict", "router_aux_loss_coef", "seq_aux", "torch_dtype", "transformers_version",
        "unsloth_fixed", "use_cache",
    }
)  # fmt: skip
# Implemented for one value only.
_FIXED_FIELDS: dict[str, tuple[object, ...]] = {
    "model_type": ("deepseek_v3",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
    "rope_scaling": (None,),
    "quantization_config": (None,),
    "sliding_window": (None,),
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A DeepSeek-V3 model: multi-head latent attention (MLA), sigmoid-routed experts, fp32.

    Sizes count elements. `q_lora_rank` None means that queries are projected directly. The first
    `first_k_dense_replace` layers have a dense MLP of `intermediate_size`, the others experts of
    `moe_intermediate_size`. `rope_interleave`: rotary dimensions come in pairs (0, 1), (2, 3), ... as DeepSeek stores
    them. `eos_token_ids` holds the ids of config.json; generation_config.json may name more.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    first_k_dense_replace: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    max_position_embeddings: int
    q_lora_rank: int | None = None
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_interleave: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in _POSITIVE_FIELDS:
            if getattr(self, name) < 1:
                raise ValueError(f"config: {name} must be at least 1, got {getattr(self, name)}")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ValueError(f"config: q_lora_rank must be null or at least 1, got {self.q_lora_rank}")
        if self.n_shared_experts < 0:
            raise ValueError(f"config: n_shared_experts must not be negative, got {self.n_shared_experts}")
        for name in ("qk_rope_head_dim", "kv_lora_rank"):
            if getattr(self, name) % 2:
                raise ValueError(f"config: {name} must be even, got {getattr(self, name)}")
        if not 0 <= self.first_k_dense_replace <= self.num_hidden_layers:
            raise ValueError(f"config: first_k_dense_replace {self.first_k_dense_replace} is beyond num_hidden_layers")
        if self.n_routed_experts % self.n_group:
            raise ValueError(f"config: n_group {self.n_group} does not divide n_routed_experts {self.n_routed_experts}")
        if self.topk_group > self.n_group:
            raise ValueError(f"config: topk_group {self.topk_group} is more than n_group {self.n_group}")
        if self.n_group > 1 and self.n_routed_experts // self.n_group < 2:
            raise ValueError("config: n_group needs at least 2 experts in each group (it is scored by its best two)")
        if self.num_experts_per_tok > self.n_routed_experts // self.n_group * self.topk_group:
            raise ValueError(
                f"config: num_experts_per_tok {self.num_experts_per_tok} is more than the experts that can be chosen"
            )

    @property
    def num_moe_layers(self) -> int:
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def kv_row_size(self) -> int:
        """Floats that the KV cache keeps for one token in one layer: the latent and the rotated key part."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def is_moe_layer(self, layer: int) -> bool:
        return layer >= self.first_k_dense_replace


_POSITIVE_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "n_routed_experts", "num_experts_per_tok", "kv_lora_rank", "qk_nope_head_dim",
    "qk_rope_head_dim", "v_head_dim", "max_position_embeddings", "n_group", "topk_group",
)  # fmt: skip


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


def model_config_from_dict(raw: dict[str, Any]) -> ModelConfig:
    """The same from the parsed JSON object; ValueError names the field and what is supported."""
    fields = dict(raw)
    if "model_type" not in fields:
        raise ValueError("config: model_type is missing; supported: 'deepseek_v3'")
    for name, supported in _FIXED_FIELDS.items():
        value = fields.pop(name, supported[0])
        if value not in supported:
            raise ValueError(f"config: {name} = {value!r} is not supported; supported: {_shown(supported)}")
    dtype = fields.get("dtype", fields.get("torch_dtype"))
    if dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"config: dtype = {dtype!r} is not supported; supported: 'float32', 'bfloat16'")
    values: dict[str, Any] = {"rope_theta": _pop_rope_theta(fields)}
    values["eos_token_ids"] = _token_ids("eos_token_id", fields.pop("eos_token_id", None))
    values["bos_token_id"] = _optional_int(fields, "bos_token_id")
    heads = fields.get("num_attention_heads")
    if fields.get("num_key_value_heads") not in (None, heads):
        raise ValueError(
            "config: num_key_value_heads must be null or equal num_attention_heads (MLA shares one latent)"
        )
    for name in ModelConfig.__dataclass_fields__:
        if name in values or name not in fields:
            continue
        values[name] = _typed(name, fields.pop(name))
    missing = [name for name in _POSITIVE_FIELDS if name not in values and name not in ("n_group", "topk_group")]
    missing += [name for name in ("n_shared_experts", "first_k_dense_replace") if name not in values]
    if missing:
        raise ValueError(f"config: {missing[0]} is missing")
    unknown = sorted(set(fields) - _IGNORED_FIELDS)
    if unknown:
        raise ValueError(f"config: {unknown[0]} = {fields[unknown[0]]!r} is not a known field of a deepseek_v3 model")
    return ModelConfig(**values)


def load_generation_defaults(directory: Path) -> GenerationDefaults:
    """Reads directory/generation_config.json; the defaults when there is no such file."""
    path = directory / "generation_config.json"
    if not path.exists():
        return GenerationDefaults()
    raw = _read_object(path)
    try:
        sampled = raw.get("do_sample", True) is not False
        return GenerationDefaults(
            eos_token_ids=_token_ids("eos_token_id", raw.get("eos_token_id")),
            temperature=float(_number(raw, "temperature", 1.0)) if sampled else 0.0,
            top_p=float(_number(raw, "top_p", 1.0)),
            top_k=int(_number(raw, "top_k", 0)),
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


def _pop_rope_theta(fields: dict[str, Any]) -> float:
    theta = fields.pop("rope_theta", None)
    parameters = fields.pop("rope_parameters", None)
    if parameters is not None:
        if not isinstance(parameters, dict):
            raise ValueError("config: rope_parameters must be an object")
        kind = parameters.get("rope_type", "default")
        if kind != "default":
            raise ValueError(f"config: rope_parameters.rope_type = {kind!r} is not supported; supported: 'default'")
        other = sorted(set(parameters) - {"rope_type", "rope_theta"})
        if other:
            raise ValueError(f"config: rope_parameters.{other[0]} is not supported; supported: rope_type, rope_theta")
        theta = parameters.get("rope_theta", theta)
    theta = 10000.0 if theta is None else theta
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0:
        raise ValueError(f"config: rope_theta must be a positive number, got {theta!r}")
    return float(theta)


def _typed(name: str, value: object) -> object:
    annotation = ModelConfig.__dataclass_fields__[name].type
    if name == "q_lora_rank" and value is None:
        return None
    if value is None and name in ("n_group", "topk_group"):
        return 1
    if annotation is bool:
        if not isinstance(value, bool):
            raise ValueError(f"config: {name} must be true or false, got {value!r}")
        return value
    if annotation is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"config: {name} must be a number, got {value!r}")
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"config: {name} must be a whole number, got {value!r}")
    return value


def _optional_int(fields: dict[str, Any], name: str) -> int | None:
    value = fields.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise ValueError(f"config: {name} must be a whole number or null, got {value!r}")
    return value


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in values):
        raise ValueError(f"{name} must be a token id, a list of them, or null, got {value!r}")
    return tuple(values)


def _number(raw: dict[str, Any], name: str, default: float) -> float:
    value = raw.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return float(value)


def _shown(values: tuple[object, ...]) -> str:
    return ", ".join("null" if value is None else repr(value) for value in values)
