"""The absorbed form is multi-head latent attention as it is written in the paper, and the cache holds what it needs."""

import numpy as np
import pytest
import torch

from expertwire.kernels.ops import attention, mla, rotary
from expertwire.kernels.ops.variants import Rope

HEADS, RANK, ROTATED, NOPE, VALUE, BLOCK, WIDTH = 3, 16, 8, 12, 10, 4, 20
EPS, SCALE, THETA = 1e-6, (NOPE + ROTATED) ** -0.5, 1e4


def weights(generator):
    """W_a, the norm's weights, U and V of every head, and the queries' projection."""
    shapes = (
        (RANK + ROTATED, WIDTH),
        (RANK,),
        (HEADS, NOPE, RANK),
        (HEADS, VALUE, RANK),
        (HEADS, NOPE + ROTATED, WIDTH),
    )
    return [torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for shape in shapes]


def turned(x, position, interleaved):
    """Pairs as complex numbers, turned by their angles; x [..., r] in fp64."""
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else x.unflatten(-1, (2, -1)).transpose(-1, -2)
    angles = position * THETA ** (-torch.arange(ROTATED // 2).double() / (ROTATED // 2))
    result = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.exp(1j * angles))
    return result.flatten(-2) if interleaved else result.transpose(-1, -2).flatten(-2)


def paper(x_TD, weights, queries, interleaved):
    """Keys and values of every head are written out; the last `queries` tokens, in fp64: [queries, H, VALUE]."""
    down, norm, up_k, up_v, project = (weight.double() for weight in weights)
    x_TD = x_TD.double()
    compressed = x_TD @ down.T
    latent = compressed[:, :RANK]
    latent = latent / (latent.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * norm
    shared = torch.stack([turned(row[RANK:], i, interleaved) for i, row in enumerate(compressed)])
    out = torch.empty(queries, HEADS, VALUE, dtype=torch.float64)
    for i in range(queries):
        position = len(x_TD) - queries + i
        for head in range(HEADS):
            query = project[head] @ x_TD[position]
            keys, values = latent[: position + 1] @ up_k[head].T, latent[: position + 1] @ up_v[head].T
            scores = keys @ query[:NOPE] + shared[: position + 1] @ turned(query[NOPE:], position, interleaved)
            out[i, head] = (scores * SCALE).softmax(0) @ values
    return out


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
@pytest.mark.parametrize("batch", [[(1, 1)], [(1, 9)], [(5, 5)], [(1, 4), (3, 11)]], ids=str)
def test_absorbed_form_is_that_of_the_paper(batch, interleaved):
    generator = torch.Generator().manual_seed(0)
    every = weights(generator)
    down, norm, up_k, up_v, project = every
    blocks = [-(-length // BLOCK) for _, length in batch]
    tables = np.zeros((len(batch), max(blocks)), np.int32)
    cache = torch.full((1 + sum(blocks), BLOCK, RANK + ROTATED), float("nan"))
    queries, expected, start = [], [], 1
    for b, (num, length) in enumerate(batch):
        tables[b, : blocks[b]] = range(start, start + blocks[b])
        x_TD = torch.randn(length, WIDTH, generator=generator)
        q_THn = torch.einsum("hnd,td->thn", project, x_TD)
        positions, angles = torch.arange(length), rotary.tables(length, Rope(theta=THETA, size=ROTATED), "cpu")
        rotated = mla.rope_and_cache(
            q_THn[:, :, NOPE:],
            x_TD @ down.T,
            norm,
            EPS,
            rotary.RopeInputs(angles, positions, start * BLOCK + positions, interleaved),
            cache,
        )
        absorbed = torch.einsum("hnc,thn->thc", up_k, q_THn[:, :, :NOPE])
        queries.append(torch.cat((absorbed, rotated), -1)[length - num :])
        expected.append(paper(x_TD, every, num, interleaved))
        start += blocks[b]
    nums, lengths = (np.array([s[i] for s in batch], np.int64) for i in (0, 1))
    seqs = attention.describe(nums, lengths, torch.from_numpy(tables))
    out = mla.reference(torch.cat(queries), cache, seqs, rank=RANK, scale=SCALE)
    actual = torch.einsum("hvc,thc->thv", up_v, out)
    torch.testing.assert_close(actual.double(), torch.cat(expected), rtol=1e-4, atol=1e-5)
