"""Configurations of mixers that SambaY models consist of (Ren et al., "Decoder-Hybrid-Decoder Architecture", 2025)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """A Mamba mixer of the first kind (Gu and Dao, 2023): see `kernels.ops.selective_scan`.

    Attributes:
        inner_size: channels.
        state_size: numbers of the state for each channel.
        dt_rank: numbers from which a token's steps are projected.
        conv_kernel: taps of the convolution, which has a bias.
        gives_memory: whether gated memory units read its scan's output.
    """

    inner_size: int
    state_size: int
    dt_rank: int
    conv_kernel: int
    gives_memory: bool = False


@dataclass(frozen=True, kw_only=True)
class GatedMemoryConfig:
    """A gated memory unit: `out_proj(silu(in_proj(x)) * memory)`.

    Attributes:
        inner_size: numbers of the memory.
        memory_layer: the earlier layer whose scan's output is the memory.
    """

    inner_size: int
    memory_layer: int


@dataclass(frozen=True, kw_only=True)
class DifferentialAttentionConfig:
    """Differential attention without positions (Ye et al., "Differential Transformer", 2024): see
    `engine.layers.differential_attention`. All projections have biases.

    Attributes:
        num_heads, num_kv_heads, head_dim: neighbouring heads are a pair.
        lambda_init: added to the layer's learned lambda; one less it is also the factor of the output.
        norm_eps: epsilon of the norm of each pair's output.
        window: tokens of the sliding window, the query's own included; None: no window.
        kv_layer: the earlier layer whose keys and values are read; None: the layer has its own.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    lambda_init: float
    norm_eps: float = 1e-5
    window: int | None = None
    kv_layer: int | None = None

    @property
    def qkv_sizes(self) -> tuple[int, ...]:
        """The output sizes of the query, key and value projections, or of the query's alone."""
        kv = self.num_kv_heads * self.head_dim
        return (self.num_heads * self.head_dim, *((kv, kv) if self.kv_layer is None else ()))
