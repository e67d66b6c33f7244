"""Tiny random checkpoints of every model family, written by transformers, which also says what their logits are."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
transformers.logging.disable_progress_bar()

VOCAB = 131
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
_DEEPSEEK: dict[str, Any] = {
    **_COMMON,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "num_key_value_heads": None,
}
_QWEN3: dict[str, Any] = {
    **_COMMON,
    "num_experts": 16,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "norm_topk_prob": True,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "v3": ("DeepseekV3", _DEEPSEEK),
    "v2": ("DeepseekV2", _DEEPSEEK),
    "qwen3": ("Qwen3Moe", _QWEN3),
}


def yarn(**settings: Any) -> dict[str, Any]:
    """rope_parameters with a context that grew 16 times: prompts of the tests lie within and beyond the old one."""
    return {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 32, **settings}


# Names begin with the family. What is no field of the config: "saved_as" (dtype on disk), "max_shard_size".
VARIANTS: dict[str, dict[str, Any]] = {
    "v3-plain": {},
    "v3-q_lora": {"q_lora_rank": 40, "num_attention_heads": 3},
    "v3-groups": {"n_group": 4, "topk_group": 2, "n_shared_experts": 2, "routed_scaling_factor": 1.3},
    "v3-no_norm-tied-halves": {"norm_topk_prob": False, "tie_word_embeddings": True, "rope_interleave": False},
    # The sizes of the embedded model.
    "v3-wide": {
        "hidden_size": 128,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "moe_intermediate_size": 32,
        "initializer_range": 0.12,
    },
    "v3-all_moe-theta-eps": {
        "first_k_dense_replace": 0,
        "q_lora_rank": 24,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "rms_norm_eps": 1e-3,
    },
    "v3-yarn-groups": {
        "rope_parameters": yarn(mscale=1.0, mscale_all_dim=1.0, beta_fast=32, beta_slow=1),
        "n_group": 4,
        "topk_group": 2,
        "q_lora_rank": 40,
    },
    "v3-yarn-halves": {"rope_parameters": yarn(truncate=False, beta_fast=8, beta_slow=0.1), "rope_interleave": False},
    "v3-bf16-shards": {"saved_as": torch.bfloat16, "max_shard_size": "60KB"},
    "v2-greedy": {"n_shared_experts": 2},
    "v2-groups-scaled": {
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 16.0,
        "q_lora_rank": 40,
        "initializer_range": 0.12,
    },
    # Groups are there and not used.
    "v2-greedy-over-groups-tied": {"n_group": 4, "topk_group": 2, "tie_word_embeddings": True},
    "v2-yarn": {"rope_parameters": yarn(mscale=0.707, mscale_all_dim=0.707, beta_fast=32, beta_slow=1)},
    "v2-yarn-mscales-differ": {
        "rope_parameters": yarn(mscale=1.4, mscale_all_dim=0.5),
        "topk_method": "group_limited_greedy",
        "n_group": 8,
        "topk_group": 3,
        "qk_rope_head_dim": 16,
    },
    "v2-yarn-attention_factor": {"rope_parameters": yarn(attention_factor=0.8), "first_k_dense_replace": 0},
    "v2-dense_between": {"moe_layer_freq": 2, "num_hidden_layers": 5},
    "v3-dense_between-all_moe": {"moe_layer_freq": 3, "num_hidden_layers": 5, "first_k_dense_replace": 0},
    "qwen3-plain": {},
    "qwen3-no_norm-tied-dense_first": {
        "norm_topk_prob": False,
        "tie_word_embeddings": True,
        "mlp_only_layers": [0, 1],
    },
    "qwen3-dense_between": {"mlp_only_layers": [0], "decoder_sparse_step": 2, "num_hidden_layers": 5},
    "qwen3-one_key_head-yarn": {"num_key_value_heads": 1, "rope_parameters": yarn(), "num_experts": 12},
    "qwen3-as_many_key_heads": {"num_key_value_heads": 4, "head_dim": 16, "rms_norm_eps": 1e-3},
    "qwen3-wide-sparse_step-bf16": {
        "decoder_sparse_step": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "head_dim": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "saved_as": torch.bfloat16,
    },
}


def save_reference(directory: Path, variant: str) -> Any:
    """Writes the checkpoint and returns the reference, whose fp32 weights are those on disk."""
    name, base = FAMILIES[variant.split("-")[0]]
    settings = {**base, **VARIANTS[variant]}
    saved_as, max_shard_size = settings.pop("saved_as", torch.float32), settings.pop("max_shard_size", "1GB")
    settings.setdefault("rope_parameters", {"rope_type": "default", "rope_theta": 1e4})
    torch.manual_seed(len(variant))
    config = getattr(transformers, f"{name}Config")(**settings, attn_implementation="eager")
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    if "moe_layer_freq" in settings:
        put_dense_layers_between(model, settings["moe_layer_freq"])
    with torch.no_grad():
        for parameter, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if parameter.endswith("e_score_correction_bias"):
                tensor.copy_(torch.randn(tensor.shape) * 0.1)
            elif "norm" in parameter:
                tensor.copy_(1 + 0.2 * torch.randn(tensor.shape))
            if "inv_freq" not in parameter:
                tensor.copy_(tensor.to(saved_as))
    state = {key: tensor.to(saved_as) for key, tensor in model.state_dict().items()}
    model.save_pretrained(directory, state_dict=state, max_shard_size=max_shard_size)
    return model


def put_dense_layers_between(model: Any, moe_layer_freq: int) -> None:
    """What transformers leaves out: DeepSeek's own code has experts in each moe_layer_freq-th layer only."""
    dense = getattr(sys.modules[type(model).__module__], type(model).__name__.replace("ForCausalLM", "MLP"))
    for number, layer in enumerate(model.model.layers):
        if number % moe_layer_freq:
            layer.mlp = dense(model.config).eval()
            for parameter in layer.mlp.parameters():
                torch.nn.init.normal_(parameter, std=model.config.initializer_range)


def reference_logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits
