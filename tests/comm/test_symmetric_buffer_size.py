"""Worst-case memory of an exchange, and the number of tokens that it is limited to."""

from types import SimpleNamespace

import pytest
import torch

from expertwire.comm.all_to_all.base import AllToAllSpec
from expertwire.comm.all_to_all.fp8 import packed
from expertwire.comm.all_to_all.symmetric_buffer import EXCHANGE_BYTES, BufferLayout, exchange_tokens

# Ranks, physical experts, D, F, tokens of a step; the tokens of an exchange.
SHAPES = {
    "DeepSeek-V3, one node": (8, 256, 7168, 2048, 8192, 2048),
    "DeepSeek-V3, 18 trays": (72, 288, 7168, 2048, 8192, 512),
    "Qwen3-30B-A3B, one node": (8, 128, 2048, 768, 8192, 8192),
    "few tokens": (72, 288, 7168, 2048, 64, 64),
}


def spec_of(ranks, experts, width, tokens):
    """Return a spec that dispatches fp8 and combines bf16."""
    return packed(
        AllToAllSpec(
            group=SimpleNamespace(rank=0, size=ranks),
            rank_offsets=tuple(range(0, experts + 1, experts // ranks)),
            max_tokens=tokens,
            hidden_size=width,
            top_k=8,
            dtype=torch.bfloat16,
        )
    )


def worst(ranks, experts, width, inner, tokens):
    """Return bytes of the symmetric buffer, and of each possible routed row's output and hidden layer, in bf16 and fp8."""
    rows = ranks * tokens * min(8, experts // ranks) * (2 * width + 3 * inner)
    return BufferLayout.of(spec_of(ranks, experts, width, tokens)).nbytes + rows


def tokens_of(ranks, experts, width, inner, tokens, **budget):
    sizes = {"num_ranks": ranks, "experts": experts // ranks, "top_k": 8}
    row_bytes = spec_of(ranks, experts, width, tokens).hidden_size
    return exchange_tokens(
        tokens, **sizes, row_bytes=row_bytes, combine_bytes=2 * width, expert_bytes=3 * inner, **budget
    )


@pytest.mark.parametrize("name", SHAPES)
def test_the_worst_case_fits(name):
    *shape, tokens, expected = SHAPES[name]
    found = tokens_of(*shape, tokens)
    assert found == expected
    assert worst(*shape, found) <= 1.01 * EXCHANGE_BYTES
    assert found == tokens or worst(*shape, 2 * found) > EXCHANGE_BYTES


def test_with_half_the_memory_half_the_tokens():
    """Half the memory is that of one of two micro-batches."""
    assert tokens_of(8, 256, 7168, 2048, 4096, budget=EXCHANGE_BYTES // 2) == 1024


def test_rows_of_an_exchange_stay_aligned():
    for tokens in (1000, 4097, 8191):
        assert tokens_of(72, 288, 7168, 2048, tokens) % 16 == 0
