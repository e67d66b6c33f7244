"""The forward pass: tokens of any mix of prefill chunks and decode steps in, logits of the asked rows out.

A row's logits are the same bits for a sequence alone, in any batch, prefilled in one piece or token by token, and
under every placement of the experts, since every number is one fixed sequence of operations on the row's own inputs:
kernels/cpu spells them out. A layer is a few calls of it; or a whole pass is one, where
the exchange of the experts allows.

Legend: T tokens, H hidden, V vocabulary, K experts per token, R requests, W block table width, S rows with logits,
L layers; the cache is [layers, blocks, rows of a block, row floats].
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.model.architecture import LatentAttentionShape
from common.model.checkpoint import Checkpoint
from common.model.config import ModelConfig
from common.model.experts import ExpertExchange, PassExchange
from common.model.grouped_attention import grouped_attention
from common.model.kv_cache import Int64Array, kv_cache_shape
from common.model.latent_attention import latent_attention
from common.model.rotary import turns
from common.model.routing import mlp_weights, routing
from kernels.cpu.batch import Bounds, CheckedBatch
from kernels.cpu.forward import CompiledModel, LayerKernels
from kernels.cpu.linear import PackedWeight
from kernels.cpu.mlp import DenseKernel, HeadKernel, Norm, add_experts, embed


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


class _DenseMlp:
    def __init__(self, checkpoint: Checkpoint, layer: int, norm: Norm) -> None:
        inner_size = checkpoint.config.intermediate_size
        self.kernel = DenseKernel(norm, mlp_weights(checkpoint, f"model.layers.{layer}.mlp", inner_size))

    def run(self, x_TH: Tensor) -> None:
        """Adds to x_TH what the layer makes of it."""
        self.kernel.run(x_TH)


class _Moe:
    """Routing, the exchange, and the shared experts: x += shared + routed sum."""

    def __init__(self, checkpoint: Checkpoint, layer: int, exchange: ExpertExchange, norm: Norm) -> None:
        self._config, self._layer, self._exchange = checkpoint.config, layer, exchange
        self.kernel = routing(checkpoint, layer, norm)

    def run(self, x_TH: Tensor) -> None:
        """Adds to x_TH what the layer makes of it."""
        routed = self.kernel.route(x_TH)
        out_TH = self._exchange.run(self._layer, routed.normed_TH, routed.expert_TK, routed.weight_TK)
        add_experts(x_TH, routed.shared_TH, out_TH)

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
        norm_before, norm_after = (
            _norm(checkpoint, f"{prefix}.{name}") for name in ("input_layernorm", "post_attention_layernorm")
        )
        self.attention = (latent_attention if is_latent else grouped_attention)(checkpoint, layer, norm_before)
        self.mlp: _DenseMlp | _Moe
        if config.is_moe_layer(layer):
            self.mlp = _Moe(checkpoint, layer, exchange, norm_after)
        else:
            self.mlp = _DenseMlp(checkpoint, layer, norm_after)


def _norm(checkpoint: Checkpoint, name: str) -> Norm:
    config = checkpoint.config
    return Norm(checkpoint.tensor(f"{name}.weight", (config.hidden_size,)), config.rms_norm_eps)


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
        self._exchange = exchange if isinstance(exchange, PassExchange) else None
        self.kv_cache_LBPC = kv_cache_LBPC
        self._cache_addresses_L = [layer_BPC.data_ptr() for layer_BPC in kv_cache_LBPC]
        self._bounds = Bounds(config.vocab_size, num_blocks, block_size, turns(config))
        self._embedding = checkpoint.tensor("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
        self._layers = [_Layer(checkpoint, layer, exchange) for layer in range(config.num_hidden_layers)]
        head = self._embedding
        if not config.tie_word_embeddings:
            head = checkpoint.tensor("lm_head.weight", (config.vocab_size, config.hidden_size))
        self._head = HeadKernel(_norm(checkpoint, "model.norm"), PackedWeight(head))
        kernels = [
            LayerKernels(layer.attention, cache_address, layer.mlp.kernel)
            for layer, cache_address in zip(self._layers, self._cache_addresses_L, strict=True)
        ]
        self._compiled = CompiledModel(kernels, self._embedding, self._head)

    def forward(self, batch: Batch, on_kv: Callable[[int], None] | None = None) -> Tensor:
        """Logits fp32 [S, V] of the asked tokens; writes the cache rows of all tokens.

        ``on_kv(layer)`` is called as soon as the cache rows of a layer are written. Raises ValueError for a token id,
        position, request, block or row out of range, before anything is written, and VoidRound when the exchange does;
        the cache rows written until then are void.
        """
        checked = CheckedBatch(
            batch.token_ids_T,
            batch.position_T,
            batch.request_index_T,
            batch.block_table_RW,
            batch.logit_index_S,
            self._bounds,
        )
        logits_SV = self._exchange.run_pass(self._compiled, checked) if self._exchange and on_kv is None else None
        return self._layer_by_layer(checked, on_kv) if logits_SV is None else logits_SV

    @torch.inference_mode()
    def _layer_by_layer(self, checked: CheckedBatch, on_kv: Callable[[int], None] | None) -> Tensor:
        if checked.num_tokens == 0:
            for layer in self._layers:
                if isinstance(layer.mlp, _Moe):
                    layer.mlp.run_empty()
            return torch.empty((0, self.config.vocab_size))
        x_TH = embed(checked, self._embedding)
        for number, (layer, cache_address) in enumerate(zip(self._layers, self._cache_addresses_L, strict=True)):
            layer.attention.run(checked, cache_address, x_TH)
            if on_kv:
                on_kv(number)
            layer.mlp.run(x_TH)
        return self._head.run(checked, x_TH)
