"""Abacus as a Hugging Face directory: written after training, read to go on with training or to evaluate.

The names are those of `DeepseekV3ForCausalLM`; the wide expert MLP of the training model is cut into one set of
matrices per expert: rows of `gate_proj` and `up_proj`, columns of `down_proj`.
"""

import json
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.abacus.model import AbacusConfig, AbacusModel, MoE
from training.abacus.tokenizer import BOS, END, PAD, write_tokenizer

_MLP_PARTS = ("gate_proj", "up_proj", "down_proj")


def huggingface_config(config: AbacusConfig) -> dict[str, object]:
    """config.json: our sizes, and every other field that changes what a reader would compute."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **asdict(config),
        "num_key_value_heads": config.num_attention_heads,
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_scaling": None,
        "rope_interleave": True,
        "tie_word_embeddings": False,
        "initializer_range": 0.06,
        "use_cache": True,
        "bos_token_id": BOS,
        "eos_token_id": END,
        "pad_token_id": PAD,
        "torch_dtype": "float32",
    }


def _expert_slice(moe: MoE, part: str, expert: int) -> Tensor:
    """The view of one expert's matrix in the wide MLP."""
    width = moe.config.moe_intermediate_size
    columns = slice(expert * width, (expert + 1) * width)
    weight: Tensor = getattr(moe.experts, part).weight
    return weight[:, columns] if part == "down_proj" else weight[columns]


def named_views(model: AbacusModel) -> dict[str, Tensor]:
    """Every tensor of the checkpoint by its Hugging Face name, as a view of the model's own memory."""
    state = {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
    views = {}
    for name, tensor in state.items():
        if ".mlp.experts." in name:
            continue
        name = name.replace("mlp.router.weight", "mlp.gate.weight")
        name = name.replace("mlp.correction_bias", "mlp.gate.e_score_correction_bias")
        views[name if name.startswith("lm_head") else f"model.{name}"] = tensor
    for index, layer in enumerate(model.layers):
        if not isinstance(layer.mlp, MoE):
            continue
        for expert in range(model.config.n_routed_experts):
            for part in _MLP_PARTS:
                view = _expert_slice(layer.mlp, part, expert).detach()
                views[f"model.layers.{index}.mlp.experts.{expert}.{part}.weight"] = view
    return views


def save_checkpoint(model: AbacusModel, directory: Path) -> None:
    """Writes the whole directory. The weights appear last and at once, so a reader never sees half a file."""
    directory.mkdir(parents=True, exist_ok=True)
    config = huggingface_config(model.config)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"bos_token_id": BOS, "eos_token_id": END, "pad_token_id": PAD, "do_sample": False}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    write_tokenizer(directory)
    tensors = {name: view.float().cpu().contiguous() for name, view in named_views(model).items()}
    partial = directory / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # save_file makes it readable by its owner alone.
    partial.rename(directory / "model.safetensors")


def load_checkpoint(directory: Path) -> AbacusModel:
    """The training model of a directory that `save_checkpoint` wrote; ValueError if tensors are missing or foreign."""
    stored = json.loads((directory / "config.json").read_text())
    model = AbacusModel(AbacusConfig(**{field.name: stored[field.name] for field in fields(AbacusConfig)}))
    tensors = load_file(directory / "model.safetensors")
    views = named_views(model)
    if different := views.keys() ^ tensors.keys():
        raise ValueError(f"{directory}: not a checkpoint of abacus; tensors differ: {sorted(different)[:3]}")
    with torch.no_grad():
        for name, view in views.items():
            view.copy_(tensors[name])
    return model
