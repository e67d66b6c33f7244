"""config.json: both spellings are read, and what is not implemented is refused by name."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.model.config import load_generation_defaults, load_model_config, model_config_from_dict
from tests.unit.model.tiny_models import TINY_RANDOM


@pytest.fixture
def raw() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((TINY_RANDOM / "config.json").read_text(encoding="utf-8"))
    return content


def test_the_original_spelling_means_the_same_as_the_new_one(raw: dict[str, Any]) -> None:
    original = dict(raw)
    del original["rope_parameters"], original["rope_interleave"], original["dtype"]
    original |= {
        "rope_theta": 10000,
        "rope_scaling": None,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "torch_dtype": "bfloat16",
        "ep_size": 1,
        "num_nextn_predict_layers": 1,
    }
    assert model_config_from_dict(original) == model_config_from_dict(raw)


@pytest.mark.parametrize("family", ["DeepseekV3", "DeepseekV2", "Qwen3Moe"])
def test_what_transformers_writes_can_be_read(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    settings = {"num_experts_per_tok": 6} if family == "DeepseekV2" else {}
    written = getattr(transformers, f"{family}Config")(**settings, eos_token_id=[1, 2]).to_dict()
    config = model_config_from_dict(written)
    assert config.eos_token_ids == (1, 2)
    assert config.kv_row_size == (2 * 4 * 64 if family == "Qwen3Moe" else 512 + 64)


def test_absent_groups_are_one_group() -> None:
    transformers = pytest.importorskip("transformers")
    written = transformers.DeepseekV3Config(n_group=None, topk_group=None).to_dict()
    assert model_config_from_dict(written).routing.n_group == 1


# As the files that are published with the weights spell things, where that matters.
PUBLISHED_V2_LITE: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 102400,
}
PUBLISHED_QWEN3: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_published_deepseek_v2_lite() -> None:
    config = model_config_from_dict(PUBLISHED_V2_LITE)
    assert (config.num_moe_layers, config.routing.scoring, config.routing.norm_topk_prob) == (26, "softmax", False)
    assert config.rope.yarn is not None
    assert config.rope.yarn.attention_factor == 1.0
    assert config.rope.yarn.score_factor == pytest.approx((0.1 * 0.707 * math.log(40) + 1) ** 2)


def test_published_qwen3() -> None:
    config = model_config_from_dict(PUBLISHED_QWEN3)
    assert (config.num_moe_layers, config.n_routed_experts, config.n_shared_experts) == (48, 128, 0)
    assert config.kv_row_size == 2 * 4 * 128
    halved = {key: value for key, value in PUBLISHED_QWEN3.items() if key != "head_dim"}
    assert model_config_from_dict(halved).kv_row_size == 2 * 4 * 64


@pytest.mark.parametrize(
    ("dense", "moe_layers"),
    [
        ({"mlp_only_layers": [2, 0, 1]}, range(3, 48)),
        ({"decoder_sparse_step": 48}, [47]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3, 4]}, [1, *range(5, 48, 2)]),
        ({"mlp_only_layers": None}, range(48)),
    ],
)
def test_dense_layers_of_qwen3_may_come_anywhere(dense: dict[str, Any], moe_layers: list[int]) -> None:
    config = model_config_from_dict(PUBLISHED_QWEN3 | dense)
    assert config.moe_layers == tuple(moe_layers) and config.num_moe_layers == len(moe_layers)


@pytest.mark.parametrize(
    ("fields", "moe_layers"),
    [
        ({"moe_layer_freq": 2}, range(2, 27, 2)),
        ({"moe_layer_freq": 5, "first_k_dense_replace": 0}, range(0, 27, 5)),
        ({"moe_layer_freq": 3, "first_k_dense_replace": 4}, range(6, 27, 3)),
    ],
)
def test_dense_layers_of_deepseek_may_lie_between(fields: dict[str, Any], moe_layers: range) -> None:
    assert model_config_from_dict(PUBLISHED_V2_LITE | fields).moe_layers == tuple(moe_layers)


def yarn(**settings: object) -> dict[str, Any]:
    return {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 64, **settings}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model_type": "llama"}, "model_type = 'llama'"),
        ({"model_type": ["deepseek_v3"]}, "model_type = ['deepseek_v3']"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method = 'greedy'"),
        ({"moe_layer_freq": 0}, "moe_layer_freq must be at least 1"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"dtype": "float16"}, "dtype = 'float16'"),
        ({"num_key_value_heads": 2}, "num_key_value_heads"),
        ({"hidden_size": "64"}, "hidden_size must be a whole number, got '64'"),
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"norm_topk_prob": 1}, "norm_topk_prob must be true or false"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be finite"),
        ({"num_experts_per_tok": 33}, "num_experts_per_tok 33"),
        ({"n_group": 5}, "n_group 5 does not divide"),
        ({"n_group": 32}, "n_group needs at least 2 experts in each group"),
        ({"topk_group": 2}, "topk_group 2 is more than n_group 1"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim must be even"),
        ({"kv_lora_rank": 31}, "kv_lora_rank must be even"),
        ({"q_lora_rank": 0}, "q_lora_rank must be at least 1"),
        ({"first_k_dense_replace": 4}, "first_k_dense_replace 4"),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"index_topk": 2048}, "index_topk = 2048 is not a known field"),
        ({"num_experts": 32}, "num_experts = 32 is not a known field"),
        ({"eos_token_id": "x"}, "eos_token_id"),
    ],
)
def test_what_is_not_supported_is_named(raw: dict[str, Any], change: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=re.escape(field)):
        model_config_from_dict(raw | change)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"rope_parameters": [1]}, "rope_parameters must be an object"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2}}, "rope_parameters.rope_type = 'linear'"),
        ({"rope_parameters": {"type": "dynamic", "factor": 2}}, "rope_parameters.type = 'dynamic'"),
        ({"rope_parameters": {"rope_theta": 1e4, "factor": 40}}, "rope_parameters.factor = 40 is not a known field"),
        ({"rope_parameters": {"rope_theta": "many"}}, "rope_parameters.rope_theta must be a number"),
        ({"rope_parameters": {"rope_theta": 1.0}}, "rope_parameters.rope_theta must be more than 1"),
        ({"rope_scaling": yarn()}, "rope_scaling and rope_parameters"),
        ({"rope_parameters": yarn(factor=None)}, "rope_parameters.factor is missing"),
        ({"rope_parameters": yarn(factor=0.5)}, "rope_parameters.factor must be finite and at least 1"),
        (
            {"rope_parameters": yarn(original_max_position_embeddings=None)},
            "original_max_position_embeddings is missing",
        ),
        ({"rope_parameters": yarn(beta_fast=1)}, "rope_parameters.beta_fast must be more than beta_slow"),
        ({"rope_parameters": yarn(mscale=0.7)}, "rope_parameters.mscale and mscale_all_dim"),
        ({"rope_parameters": yarn(mscale_all_dim=1.0)}, "rope_parameters.mscale and mscale_all_dim"),
        ({"rope_parameters": yarn(type="linear")}, "rope_parameters.type = 'linear'"),
        ({"rope_parameters": yarn(truncate=1)}, "rope_parameters.truncate must be true or false"),
        ({"rope_parameters": yarn(partial_rotary_factor=0.5)}, "rope_parameters.partial_rotary_factor = 0.5"),
    ],
)
def test_rope_that_is_not_supported_is_named(raw: dict[str, Any], change: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=re.escape(field)):
        model_config_from_dict(raw | change)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        # Published codes disagree about what this means.
        ({"norm_topk_prob": True}, "norm_topk_prob = True"),
        ({"scoring_func": "sigmoid"}, "scoring_func = 'sigmoid'"),
        ({"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc'"),
        ({"topk_method": "group_limited_greedy", "n_group": 3}, "n_group 3 does not divide"),
        ({"topk_method": "group_limited_greedy", "topk_group": 2}, "topk_group 2"),
        ({"routed_scaling_factor": None}, "routed_scaling_factor is missing"),
        ({"rope_interleave": False}, "rope_interleave = False is not a known field of a deepseek_v2 model"),
    ],
)
def test_what_deepseek_v2_does_not_support_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=re.escape(field)):
        model_config_from_dict(PUBLISHED_V2_LITE | change)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"mlp_only_layers": 3}, "mlp_only_layers must be a list"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must be at least 1"),
        ({"num_key_value_heads": 5}, "num_key_value_heads 5 does not divide num_attention_heads 32"),
        ({"num_key_value_heads": None}, "num_key_value_heads is missing"),
        ({"head_dim": 63}, "head_dim must be even"),
        ({"num_experts": 0}, "num_experts must be at least 1"),
        ({"norm_topk_prob": None}, "norm_topk_prob is missing"),
        ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size = 64 is not a known field"),
        ({"rope_scaling": yarn(mscale=1.0)}, "rope_scaling.mscale = 1.0 is not a known field"),
    ],
)
def test_what_qwen3_does_not_support_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=re.escape(field)):
        model_config_from_dict(PUBLISHED_QWEN3 | change)


@pytest.mark.parametrize("field", ["model_type", "hidden_size", "kv_lora_rank", "n_shared_experts", "norm_topk_prob"])
def test_a_missing_field_is_named(raw: dict[str, Any], field: str) -> None:
    del raw[field]
    with pytest.raises(ValueError, match=f"{field} is missing"):
        model_config_from_dict(raw)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model_type": "llama"}', b"\xff\xfe"])
def test_a_broken_file_is_one_line_with_its_path(tmp_path: Path, content: str | bytes | None) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        load_model_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_generation_defaults(tmp_path: Path) -> None:
    assert load_generation_defaults(tmp_path).temperature == 1.0
    path = tmp_path / "generation_config.json"
    path.write_text('{"eos_token_id": [3, 5], "temperature": 0.6, "top_p": 0.95, "top_k": null}')
    defaults = load_generation_defaults(tmp_path)
    assert (defaults.eos_token_ids, defaults.temperature, defaults.top_p, defaults.top_k) == ((3, 5), 0.6, 0.95, 0)
    path.write_text('{"do_sample": false, "temperature": 0.6}')
    assert load_generation_defaults(tmp_path).temperature == 0.0
    path.write_text('{"temperature": "hot"}')
    with pytest.raises(ValueError, match="temperature must be a number"):
        load_generation_defaults(tmp_path)


def test_what_the_router_needs_does_not_load_torch() -> None:
    code = (
        "import sys, common.model.config, common.model.tokenizer, common.model.sampling; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"
