"""What a checkpoint computes: the model families reduced to a few choices that the code knows. Without torch.

A family is a reader in `families.py`; nothing else asks for a model's name. Sizes count elements.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Yarn:
    """YaRN (arXiv:2309.00071): dimensions that turn slowly are slowed down by `factor`, fast ones stay as trained.

    In between, from `beta_fast` to `beta_slow` turns within `original_max_position_embeddings`, the mix is linear;
    `truncate` rounds these borders to whole dimensions. `attention_factor` multiplies rotated queries and keys,
    `score_factor` the scores of all dimensions (the square of what DeepSeek derives from mscale_all_dim).
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    score_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions; `yarn` None means as trained."""

    theta: float = 10000.0
    yarn: Yarn | None = None


@dataclass(frozen=True, slots=True)
class LatentAttentionShape:
    """Multi-head latent attention (MLA, arXiv:2405.04434).

    `q_lora_rank` None: queries are projected directly. `rope_interleave`: rotary dimensions come in pairs (0, 1),
    (2, 3), ... as DeepSeek stores them, and not as (0, n / 2), (1, n / 2 + 1), ...
    """

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    rope_interleave: bool = True

    def __post_init__(self) -> None:
        for name in ("qk_rope_head_dim", "kv_lora_rank"):
            if getattr(self, name) % 2:
                raise ValueError(f"config: {name} must be even, got {getattr(self, name)}")

    @property
    def rotary_dim(self) -> int:
        return self.qk_rope_head_dim

    @property
    def kv_row_size(self) -> int:
        """The latent and the rotated key part, shared by all heads."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True, slots=True)
class GroupedAttentionShape:
    """Grouped-query attention (GQA) with normed queries and keys; heads rotate in halves."""

    num_key_value_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        if self.head_dim % 2:
            raise ValueError(f"config: head_dim must be even, got {self.head_dim}")

    @property
    def rotary_dim(self) -> int:
        return self.head_dim

    @property
    def kv_row_size(self) -> int:
        """The keys of all key heads, then the values."""
        return 2 * self.num_key_value_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class Routing:
    """How a token's experts are chosen and weighed.

    `scoring` "sigmoid": each expert scored by itself; a correction bias takes part in the choice, and a group is as
    good as its best two experts (DeepSeek-V3). "softmax": no bias, a group is as good as its best one (DeepSeek-V2,
    Qwen3). `norm_topk_prob`: the weights of a token add up to `routed_scaling_factor`.
    """

    scoring: Literal["sigmoid", "softmax"]
    norm_topk_prob: bool
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1

    @property
    def num_scored_per_group(self) -> int:
        return 2 if self.scoring == "sigmoid" else 1


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A mixture-of-experts decoder computed in fp32.

    The first `first_k_dense_replace` layers and `dense_layers` have a dense MLP of `intermediate_size`. The others have
    `n_routed_experts` experts of `moe_intermediate_size` and, as one MLP, `n_shared_experts` for every token.
    `eos_token_ids` holds the ids of config.json; generation_config.json may name more.
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
    max_position_embeddings: int
    attention: LatentAttentionShape | GroupedAttentionShape
    routing: Routing
    rope: Rope
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dense_layers: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        num_experts, n_group, topk_group = self.n_routed_experts, self.routing.n_group, self.routing.topk_group
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError(f"config: first_k_dense_replace {self.first_k_dense_replace} is beyond num_hidden_layers")
        if num_experts % n_group:
            raise ValueError(f"config: n_group {n_group} does not divide n_routed_experts {num_experts}")
        if topk_group > n_group:
            raise ValueError(f"config: topk_group {topk_group} is more than n_group {n_group}")
        if n_group > 1 and num_experts // n_group < self.routing.num_scored_per_group:
            raise ValueError("config: n_group needs at least 2 experts in each group (it is scored by its best two)")
        if self.num_experts_per_tok > num_experts // n_group * topk_group:
            raise ValueError(
                f"config: num_experts_per_tok {self.num_experts_per_tok} is more than the experts that can be chosen"
            )
        if isinstance(self.attention, GroupedAttentionShape):
            key_heads = self.attention.num_key_value_heads
            if self.num_attention_heads % key_heads:
                raise ValueError(
                    f"config: num_key_value_heads {key_heads} does not divide "
                    f"num_attention_heads {self.num_attention_heads}"
                )

    @property
    def num_moe_layers(self) -> int:
        return len(self.moe_layers)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers with experts, in order: expert memory and placements count these only."""
        return tuple(layer for layer in range(self.num_hidden_layers) if self.is_moe_layer(layer))

    @property
    def kv_row_size(self) -> int:
        """Floats that the KV cache keeps for one token in one layer."""
        return self.attention.kv_row_size

    def is_moe_layer(self, layer: int) -> bool:
        return layer >= self.first_k_dense_replace and layer not in self.dense_layers
