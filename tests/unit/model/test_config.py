"""config.json: both spellings are read, and what is not implemented is refused by name."""

import json
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


def test_what_transformers_writes_can_be_read() -> None:
    transformers = pytest.importorskip("transformers")
    written = transformers.DeepseekV3Config(n_group=None, topk_group=None, eos_token_id=[1, 2]).to_dict()
    config = model_config_from_dict(written)
    assert (config.n_group, config.topk_group, config.eos_token_ids) == (1, 1, (1, 2))
    assert config.kv_row_size == 512 + 64


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model_type": "llama"}, "model_type = 'llama'"),
        ({"rope_scaling": {"type": "yarn", "factor": 40}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 40}}, "rope_parameters.rope_type = 'yarn'"),
        ({"rope_parameters": {"rope_theta": 1e4, "factor": 40}}, "rope_parameters.factor"),
        ({"rope_parameters": {"rope_theta": "many"}}, "rope_theta"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"dtype": "float16"}, "dtype = 'float16'"),
        ({"num_key_value_heads": 2}, "num_key_value_heads"),
        ({"hidden_size": "64"}, "hidden_size must be a whole number, got '64'"),
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"norm_topk_prob": 1}, "norm_topk_prob must be true or false"),
        ({"num_experts_per_tok": 33}, "num_experts_per_tok 33"),
        ({"n_group": 5}, "n_group 5 does not divide"),
        ({"topk_group": 2}, "topk_group 2 is more than n_group 1"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim must be even"),
        ({"kv_lora_rank": 31}, "kv_lora_rank must be even"),
        ({"first_k_dense_replace": 4}, "first_k_dense_replace 4"),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"index_topk": 2048}, "index_topk = 2048 is not a known field"),
        ({"eos_token_id": "x"}, "eos_token_id"),
    ],
)
def test_what_is_not_supported_is_named(raw: dict[str, Any], change: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=re.escape(field)):
        model_config_from_dict(raw | change)


@pytest.mark.parametrize("field", ["model_type", "hidden_size", "kv_lora_rank", "n_shared_experts"])
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
