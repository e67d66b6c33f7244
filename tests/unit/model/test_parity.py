"""Logits agree with transformers' DeepseekV3ForCausalLM to 1e-4: whole prompts, and decode steps after them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.model.checkpoint import Checkpoint
from tests.unit.model.tiny_models import TINY_RANDOM, feed, open_model

transformers = pytest.importorskip("transformers")
transformers.logging.disable_progress_bar()

BASE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "q_lora": {"q_lora_rank": 40, "num_attention_heads": 3, "num_key_value_heads": 3},
    "groups": {"n_group": 4, "topk_group": 2, "n_shared_experts": 2, "routed_scaling_factor": 1.3},
    "no_norm_tied": {"norm_topk_prob": False, "tie_word_embeddings": True, "rope_interleave": False},
    # The sizes of the embedded model.
    "wide": {
        "hidden_size": 128,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "moe_intermediate_size": 32,
        "initializer_range": 0.12,
    },
    "all_moe_theta": {"first_k_dense_replace": 0, "q_lora_rank": 24, "rope_theta": 500.0, "rms_norm_eps": 1e-3},
}


def save_reference(directory: Path, variant: str) -> Any:
    torch.manual_seed(len(variant))
    settings = {**BASE, **VARIANTS[variant]}
    theta = settings.pop("rope_theta", 10000.0)
    config = transformers.DeepseekV3Config(
        **settings, rope_parameters={"rope_type": "default", "rope_theta": theta}, attn_implementation="eager"
    )
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(torch.randn(tensor.shape) * 0.1)
            elif "norm" in name:
                tensor.copy_(1 + 0.2 * torch.randn(tensor.shape))
    model.save_pretrained(directory)
    return model


def reference_logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_prompts_and_decode_steps_agree_with_transformers(variant: str, tmp_path: Path) -> None:
    reference = save_reference(tmp_path, variant)
    model = open_model(tmp_path, num_blocks=40, block_size=24)
    rng = np.random.default_rng(3)
    worst = 0.0
    for prompt_size in (1, 17, 150):
        ids = rng.integers(0, BASE["vocab_size"], prompt_size + 4).tolist()
        expected = reference_logits(reference, ids)
        table = rng.permutation(40).tolist()
        whole = feed(model, [(ids, 0, table)])[0]
        got = [feed(model, [(ids[:prompt_size], 0, table)])[0]]
        for position in range(prompt_size, len(ids)):
            got += feed(model, [([ids[position]], position, table)])
        assert torch.equal(torch.cat(got), whole)
        worst = max(worst, float((whole - expected).abs().max()))
        assert float(expected.std()) > 0.3, "logits too flat to tell a difference"
    print(f"{variant}: largest difference of logits {worst:.2e}")
    assert worst <= 1e-4


def test_the_committed_checkpoint_agrees_with_transformers() -> None:
    reference = transformers.DeepseekV3ForCausalLM.from_pretrained(TINY_RANDOM, dtype=torch.float32).eval()
    ids = list(np.random.default_rng(4).integers(0, Checkpoint.open(TINY_RANDOM).config.vocab_size, 100))
    got = feed(open_model(), [(ids, 0, list(range(10)))])[0]
    worst = float((got - reference_logits(reference, ids)).abs().max())
    print(f"tiny-random: largest difference of logits {worst:.2e}")
    assert worst <= 1e-4
