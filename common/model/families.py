"""From the fields of config.json to a `ModelConfig`: one reader for each model family.

A reader takes the fields that its family's published code reads. Where the published codes of a family disagree about
a value, the value is refused. docs/models.md lists all fields.
"""

from collections.abc import Callable
from typing import Any

from common.model.architecture import GroupedAttentionShape, LatentAttentionShape, ModelConfig, Routing
from common.model.json_fields import JsonFields
from common.model.rope_fields import read_rope

# Without effect on the forward pass in fp32 inference, in every family.
_IGNORED_FIELDS = frozenset(
    {
        "_attn_implementation", "_commit_hash", "_name_or_path", "add_cross_attention", "architectures",
        "attention_dropout", "auto_map", "chunk_size_feed_forward", "id2label", "initializer_range", "is_decoder",
        "is_encoder_decoder", "label2id", "output_attentions", "output_hidden_states", "output_router_logits",
        "pad_token_id", "pretraining_tp", "problem_type", "return_dict", "router_aux_loss_coef",
        "transformers_version", "unsloth_fixed", "use_cache",
    }
)  # fmt: skip
_IGNORED_DEEPSEEK_FIELDS = frozenset(
    {
        "aux_loss_alpha", "ep_size", "head_dim", "num_mtp_layers", "num_nextn_predict_layers", "qk_head_dim", "seq_aux",
    }
)  # fmt: skip
# A window is used only with use_sliding_window, which is refused.
_IGNORED_QWEN3_FIELDS = frozenset({"max_window_layers", "sliding_window"})


def model_config_from_dict(raw: dict[str, Any]) -> ModelConfig:
    """``raw``: the parsed JSON object. Raises ValueError that names the field and says what is supported."""
    fields = JsonFields(raw)
    name = fields.take("model_type")
    supported = ", ".join(repr(family) for family in _READERS)
    if name is None:
        raise fields.error("model_type", f"is missing; supported: {supported}")
    if not isinstance(name, str) or name not in _READERS:
        raise fields.error("model_type", f"= {name!r} is not supported; supported: {supported}")
    read, ignored = _READERS[name]
    config = read(fields)
    unknown = sorted(set(fields.left) - _IGNORED_FIELDS - ignored)
    if unknown:
        raise fields.error(unknown[0], f"= {fields.left[unknown[0]]!r} is not a known field of a {name} model")
    return config


def _read_deepseek_v2(fields: JsonFields) -> ModelConfig:
    fields.choice("scoring_func", "softmax")
    # transformers never normalises, the code published with the weights normalises instead of scaling.
    fields.choice("norm_topk_prob", False)
    scaling = fields.number("routed_scaling_factor")
    method = fields.choice("topk_method", "greedy", "group_limited_greedy")
    n_group, topk_group = fields.whole("n_group", default=1), fields.whole("topk_group", default=1)
    if method == "greedy":
        n_group = topk_group = 1
    return _read_deepseek(fields, True, Routing("softmax", False, scaling, n_group, topk_group))


def _read_deepseek_v3(fields: JsonFields) -> ModelConfig:
    fields.choice("scoring_func", "sigmoid")
    fields.choice("topk_method", "noaux_tc")
    routing = Routing(
        scoring="sigmoid",
        norm_topk_prob=fields.flag("norm_topk_prob"),
        routed_scaling_factor=fields.number("routed_scaling_factor"),
        n_group=fields.whole("n_group", default=1),
        topk_group=fields.whole("topk_group", default=1),
    )
    return _read_deepseek(fields, fields.flag("rope_interleave", default=True), routing)


def _read_deepseek(fields: JsonFields, rope_interleave: bool, routing: Routing) -> ModelConfig:
    """What both generations have in common."""
    fields.choice("mlp_bias", False)
    fields.choice("sliding_window", None)
    common = _common(fields)
    if fields.take("num_key_value_heads") not in (None, common["num_attention_heads"]):
        raise fields.error(
            "num_key_value_heads", "must be null or equal num_attention_heads (latent attention shares one row)"
        )
    attention = LatentAttentionShape(
        kv_lora_rank=fields.whole("kv_lora_rank"),
        qk_nope_head_dim=fields.whole("qk_nope_head_dim"),
        qk_rope_head_dim=fields.whole("qk_rope_head_dim"),
        v_head_dim=fields.whole("v_head_dim"),
        q_lora_rank=fields.optional_whole("q_lora_rank"),
        rope_interleave=rope_interleave,
    )
    return ModelConfig(
        n_routed_experts=fields.whole("n_routed_experts"),
        n_shared_experts=fields.whole("n_shared_experts", at_least=0),
        first_k_dense_replace=fields.whole("first_k_dense_replace", at_least=0),
        dense_layers=_between_experts(fields, common["num_hidden_layers"]),
        attention=attention,
        routing=routing,
        rope=read_rope(fields, scales_scores=True),
        **common,
    )


def _read_qwen3_moe(fields: JsonFields) -> ModelConfig:
    fields.choice("use_sliding_window", False)
    common = _common(fields)
    head_dim = fields.optional_whole("head_dim") or common["hidden_size"] // common["num_attention_heads"]
    # transformers 5 writes the second name.
    experts = "num_experts" if "num_experts" in fields else "num_local_experts"
    return ModelConfig(
        n_routed_experts=fields.whole(experts),
        n_shared_experts=0,
        first_k_dense_replace=0,
        dense_layers=_dense_layers(fields, common["num_hidden_layers"]),
        attention=GroupedAttentionShape(fields.whole("num_key_value_heads"), head_dim),
        routing=Routing("softmax", norm_topk_prob=fields.flag("norm_topk_prob")),
        rope=read_rope(fields, scales_scores=False),
        **common,
    )


def _between_experts(fields: JsonFields, num_layers: int) -> frozenset[int]:
    """DeepSeek has experts in each moe_layer_freq-th layer, counted from layer 0, as far as the first are not dense.

    As in the code published with the weights; transformers ignores the field.
    """
    every = fields.whole("moe_layer_freq", default=1)
    return frozenset(layer for layer in range(num_layers) if layer % every)


def _dense_layers(fields: JsonFields, num_layers: int) -> frozenset[int]:
    """Qwen3 names its dense layers one by one, and all but each decoder_sparse_step-th are."""
    named = fields.take("mlp_only_layers") or []
    if not isinstance(named, list) or any(isinstance(item, bool) or not isinstance(item, int) for item in named):
        raise fields.error("mlp_only_layers", f"must be a list of layer numbers, got {named!r}")
    step = fields.whole("decoder_sparse_step", default=1)
    return frozenset(layer for layer in range(num_layers) if layer in named or (layer + 1) % step)


def _common(fields: JsonFields) -> dict[str, Any]:
    """Arguments of `ModelConfig` that every family spells alike."""
    fields.choice("hidden_act", "silu")
    fields.choice("attention_bias", False)
    fields.choice("quantization_config", None)
    fields.choice("dtype", None, "float32", "bfloat16")
    fields.choice("torch_dtype", None, "float32", "bfloat16")
    sizes = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_experts_per_tok",
        "max_position_embeddings",
    )
    return {
        **{name: fields.whole(name) for name in sizes},
        "rms_norm_eps": fields.number("rms_norm_eps", default=1e-6),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", default=False),
        "bos_token_id": fields.optional_whole("bos_token_id", at_least=0),
        "eos_token_ids": fields.token_ids("eos_token_id"),
    }


_READERS: dict[str, tuple[Callable[[JsonFields], ModelConfig], frozenset[str]]] = {
    "deepseek_v2": (_read_deepseek_v2, _IGNORED_DEEPSEEK_FIELDS),
    "deepseek_v3": (_read_deepseek_v3, _IGNORED_DEEPSEEK_FIELDS),
    "qwen3_moe": (_read_qwen3_moe, _IGNORED_QWEN3_FIELDS),
}
