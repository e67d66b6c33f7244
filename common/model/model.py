"""The forward pass: tokens of any mix of prefill chunks and decode steps in, logits of the asked rows out.

A row's logits are the same bits for a sequence alone, in any batch, prefilled in one piece or token by token, and
under every placement of the experts; row_blocks.py, paged_attention.py and experts.py say why.

Legend: T tokens (padded to whole row blocks inside), H hidden, V vocabulary, K experts per token,
R requests, W block table width, S rows with logits; the cache is [layers, blocks, rows of a block, row floats].
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.model.architecture import LatentAttentionShape
from common.model.checkpoint import Checkpoint
from common.model.config import ModelConfig
from common.model.experts import ExpertExchange
from common.model.grouped_attention import GroupedAttention
from common.model.kv_cache import Int64Array, kv_cache_shape
from common.model.latent_attention import LatentAttention
from common.model.paged_attention import Attention, plan_attention
from common.model.rotary import RotaryTable
from common.model.routing import Router
from common.model.row_blocks import RmsNorm, input_major, linear, num_padded, pad_rows, silu


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass. Arrays are int64.

    token_ids_T, position_T: the tokens and their places in their requests; request_index_T: the row of each token's
    request in block_table_RW; in any order. Every earlier position of a request must be in the cache already or in
    this batch. block_table_RW: block ids; entries past a request's last block are not read. logit_index_S: which of
    the T tokens want logits. All may be empty: a rank without work still takes part in the exchange of every layer.
    """

    token_ids_T: Int64Array
    position_T: Int64Array
    request_index_T: Int64Array
    block_table_RW: Int64Array
    logit_index_S: Int64Array

    def __post_init__(self) -> None:
        assert len(self.token_ids_T) == len(self.position_T) == len(self.request_index_T)
        assert self.block_table_RW.ndim == 2

    @classmethod
    def empty(cls) -> "Batch":
        none = np.zeros(0, dtype=np.int64)
        return cls(none, none, none, np.zeros((0, 0), dtype=np.int64), none)


class _Mlp:
    """A dense SwiGLU MLP with weights side by side, input-major: a dense layer's, or the shared experts'."""

    def __init__(self, checkpoint: Checkpoint, prefix: str, inner_size: int) -> None:
        hidden = checkpoint.config.hidden_size
        gate = checkpoint.tensor(f"{prefix}.gate_proj.weight", (inner_size, hidden))
        up = checkpoint.tensor(f"{prefix}.up_proj.weight", (inner_size, hidden))
        self._gate_up = input_major(torch.cat((gate, up)))
        self._down = input_major(checkpoint.tensor(f"{prefix}.down_proj.weight", (hidden, inner_size)))

    def run(self, x_TH: Tensor, num_tokens: int) -> Tensor:
        del num_tokens  # the padding is computed too
        gate, up = linear(x_TH, self._gate_up).chunk(2, dim=1)
        return linear(silu(gate).mul_(up), self._down)


class _Moe:
    """Routing, the exchange, and the shared experts: out = shared + routed sum."""

    def __init__(self, checkpoint: Checkpoint, layer: int, exchange: ExpertExchange) -> None:
        config = checkpoint.config
        prefix = f"model.layers.{layer}.mlp"
        self._config, self._layer, self._exchange = config, layer, exchange
        self._router = Router(checkpoint, f"{prefix}.gate")
        self._shared = None
        if config.n_shared_experts:
            inner_size = config.moe_intermediate_size * config.n_shared_experts
            self._shared = _Mlp(checkpoint, f"{prefix}.shared_experts", inner_size)

    def run(self, x_TH: Tensor, num_tokens: int) -> Tensor:
        topk_expert_TK, topk_weight_TK = self._router.run(x_TH)
        routed = self._exchange.run(
            self._layer, x_TH[:num_tokens], topk_expert_TK[:num_tokens], topk_weight_TK[:num_tokens]
        )
        if self._shared is None:
            return pad_rows(routed)
        out_TH = self._shared.run(x_TH, num_tokens)
        out_TH[:num_tokens] += routed
        return out_TH

    def run_empty(self) -> None:
        """This rank has no token: it takes part in the exchange all the same."""
        top_k = self._config.num_experts_per_tok
        self._exchange.run(
            self._layer,
            torch.empty((0, self._config.hidden_size)),
            torch.empty((0, top_k), dtype=torch.int64),
            torch.empty((0, top_k)),
        )


class _Layer:
    def __init__(self, checkpoint: Checkpoint, layer: int, exchange: ExpertExchange) -> None:
        config = checkpoint.config
        prefix = f"model.layers.{layer}"
        is_latent = isinstance(config.attention, LatentAttentionShape)
        self.attention: Attention = (LatentAttention if is_latent else GroupedAttention)(checkpoint, layer)
        self.norm_before = _norm(checkpoint, f"{prefix}.input_layernorm")
        self.norm_after = _norm(checkpoint, f"{prefix}.post_attention_layernorm")
        self.mlp: _Mlp | _Moe
        if config.is_moe_layer(layer):
            self.mlp = _Moe(checkpoint, layer, exchange)
        else:
            self.mlp = _Mlp(checkpoint, f"{prefix}.mlp", config.intermediate_size)


def _norm(checkpoint: Checkpoint, name: str) -> RmsNorm:
    config = checkpoint.config
    return RmsNorm(checkpoint.tensor(f"{name}.weight", (config.hidden_size,)), config.rms_norm_eps)


class Model:
    """A loaded model without its routed experts, which belong to the exchange.

    kv_cache_LBPC: fp32 [num_hidden_layers, num_blocks, block_size, kv_row_size], contiguous (`kv_cache_shape`);
    written in place. Raises ValueError when the checkpoint lacks a tensor or the cache has another shape.
    """

    def __init__(self, checkpoint: Checkpoint, exchange: ExpertExchange, kv_cache_LBPC: Tensor) -> None:
        config = checkpoint.config
        num_blocks, block_size = kv_cache_LBPC.shape[1:3]
        if tuple(kv_cache_LBPC.shape) != kv_cache_shape(config, num_blocks, block_size):
            raise ValueError(f"KV cache has shape {tuple(kv_cache_LBPC.shape)}, which does not fit the model")
        if kv_cache_LBPC.dtype != torch.float32 or not kv_cache_LBPC.is_contiguous():
            raise ValueError("KV cache must be contiguous fp32")
        self.config: ModelConfig = config
        self.kv_cache_LBPC = kv_cache_LBPC
        self._caches_FC = kv_cache_LBPC.flatten(1, 2).unbind(0)
        self._embedding = checkpoint.tensor("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
        self._layers = [_Layer(checkpoint, layer, exchange) for layer in range(config.num_hidden_layers)]
        self._norm = _norm(checkpoint, "model.norm")
        self._rotary = RotaryTable(config)
        head = self._embedding
        if not config.tie_word_embeddings:
            head = checkpoint.tensor("lm_head.weight", (config.vocab_size, config.hidden_size))
        self._head = input_major(head)

    @torch.inference_mode()
    def forward(self, batch: Batch, on_kv: Callable[[int], None] | None = None) -> Tensor:
        """Logits fp32 [S, V] of the asked tokens; writes the cache rows of all tokens.

        ``on_kv(layer)`` is called as soon as the cache rows of a layer are written. Raises ValueError for a token id or
        position out of range, and VoidRound when the exchange does; the cache rows written until then are void.
        """
        num_tokens = len(batch.token_ids_T)
        if num_tokens == 0:
            for layer in self._layers:
                if isinstance(layer.mlp, _Moe):
                    layer.mlp.run_empty()
            return torch.empty((0, self.config.vocab_size))
        self._check(batch)
        plan = plan_attention(
            batch.position_T, batch.request_index_T, batch.block_table_RW, self.kv_cache_LBPC.shape[2]
        )
        padding = num_padded(num_tokens) - num_tokens
        x_TH = self._embedding.index_select(0, torch.from_numpy(np.pad(batch.token_ids_T, (0, padding))))
        turn_T1h = self._rotary.at(torch.from_numpy(np.pad(batch.position_T, (0, padding))))
        for number, (layer, cache_FC) in enumerate(zip(self._layers, self._caches_FC, strict=True)):
            x_TH = x_TH + layer.attention.run(layer.norm_before.run(x_TH), turn_T1h, plan, cache_FC)
            if on_kv:
                on_kv(number)
            x_TH = x_TH + layer.mlp.run(layer.norm_after.run(x_TH), num_tokens)
        asked_SH = pad_rows(x_TH.index_select(0, torch.from_numpy(batch.logit_index_S)))
        logits = linear(self._norm.run(asked_SH), self._head)
        return logits[: len(batch.logit_index_S)]

    def _check(self, batch: Batch) -> None:
        if batch.token_ids_T.min() < 0 or batch.token_ids_T.max() >= self.config.vocab_size:
            raise ValueError(f"token id outside 0..{self.config.vocab_size - 1}")
        if batch.position_T.min() < 0 or batch.position_T.max() >= self.config.max_position_embeddings:
            raise ValueError(f"position outside 0..{self.config.max_position_embeddings - 1}")
