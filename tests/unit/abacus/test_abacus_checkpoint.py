"""The shipped checkpoint: complete, small, readable by others, and right."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from common.abacus_tasks import KINDS
from training.abacus.checkpoint import load_checkpoint, save_checkpoint
from training.abacus.evaluate import evaluate
from training.abacus.model import AbacusConfig, AbacusModel
from training.abacus.tokenizer import END, VOCAB_SIZE

CHECKPOINT = Path(__file__).parents[3] / "models" / "abacus"
FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "README.md",
}
MAX_BYTES = 12_000_000


def _model_with_peaked_routing() -> AbacusModel:
    torch.manual_seed(0)
    model = AbacusModel(AbacusConfig()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
        for moe in model.moe_layers():
            moe.correction_bias.normal_(std=0.1)
    return model


def test_the_directory_is_complete_and_small() -> None:
    assert {path.name for path in CHECKPOINT.iterdir()} == FILES
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= MAX_BYTES


def test_the_config_describes_the_promised_architecture() -> None:
    config = json.loads((CHECKPOINT / "config.json").read_text())
    promised = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "n_routed_experts": 32,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "rope_scaling": None,
        "vocab_size": VOCAB_SIZE,
        "eos_token_id": END,
    }
    assert {name: config[name] for name in promised} == promised
    assert config["num_hidden_layers"] - config["first_k_dense_replace"] >= 4
    assert config["max_position_embeddings"] >= 1024
    assert json.loads((CHECKPOINT / "generation_config.json").read_text())["eos_token_id"] == END


def test_every_expert_has_its_own_fp32_tensors() -> None:
    with safe_open(CHECKPOINT / "model.safetensors", framework="pt") as tensors:
        names = set(tensors.keys())
        for layer in range(1, 5):
            mlp = f"model.layers.{layer}.mlp"
            assert tensors.get_tensor(f"{mlp}.gate.e_score_correction_bias").shape == (32,)
            for expert in range(32):
                shapes = {"gate_proj": (32, 128), "up_proj": (32, 128), "down_proj": (128, 32)}
                for part, shape in shapes.items():
                    tensor = tensors.get_tensor(f"{mlp}.experts.{expert}.{part}.weight")
                    assert tensor.shape == shape and tensor.dtype == torch.float32
    assert "model.layers.0.mlp.gate_proj.weight" in names and "lm_head.weight" in names


def test_saving_and_loading_keeps_every_bit(tmp_path: Path) -> None:
    model = _model_with_peaked_routing()
    save_checkpoint(model, tmp_path)
    for name, tensor in load_checkpoint(tmp_path).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    save_checkpoint(AbacusModel(AbacusConfig(num_hidden_layers=2)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"not a checkpoint of abacus; tensors differ: \['model.layers.2"):
        load_checkpoint(tmp_path)


def test_transformers_computes_the_same_logits(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()  # Its thread would outlive the test.
    model = _model_with_peaked_routing()
    save_checkpoint(model, tmp_path)
    other = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path)
    ids_BS = torch.randint(0, VOCAB_SIZE, (2, 80), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits_BSV, _ = model(ids_BS, torch.ones_like(ids_BS, dtype=torch.bool))
        other_BSV = other(ids_BS).logits
    assert logits_BSV.std() > 0.5
    assert (logits_BSV - other_BSV).abs().max() <= 1e-3


def test_the_shipped_model_answers_unseen_prompts() -> None:
    """A small sample; the full measurement is in benchmarks/results."""
    report = evaluate(load_checkpoint(CHECKPOINT).eval(), 16, 3, torch.device("cpu"))
    assert report.accuracy.keys() == set(KINDS)
    assert all(accuracy >= 15 / 16 for accuracy in report.accuracy.values()), report.failures
    for layer in report.load_summary():
        assert layer["max_over_mean"] > 2 and layer["min_over_mean"] > 0.1
