"""Gated delta rule with one decay for each head, in chunks.

    S_t = e^g_t S_{t-1} + k_t u_t^T;  u_t = beta_t (v_t - e^g_t S_{t-1}^T k_t);  o_t = S_t^T q_t

with the state S [d, v] of a head, g_t = A softplus(a_t + dt_bias), A = -e^A_log, and beta_t = sigmoid(b_t). q and k are
divided by their norm, sqrt(sum of squares + 1e-6), and q also by sqrt(d). Head h has the q and k of key head h // (H / G).

In chunks of 64 positions, with G_t the sum of g from the beginning of t's chunk to t, and S the state before it:

    u_t = beta_t (v_t - e^G_t S^T k_t - sum_{s<t} e^(G_t - G_s) (k_t . k_s) u_s)
    o_t = e^G_t S^T q_t + sum_{s<=t} e^(G_t - G_s) (q_t . k_s) u_s
    S' = e^G_r S + sum_s e^(G_r - G_s) k_s u_s^T

where s is in the chunk and r its last position. The chunk cache holds k, u and g. `recurrent` says why, and where states lie.

Yang, Kautz and Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule" (2024), has
a chunked form.

T tokens, D width of the rows, H heads of values (and of the recurrent mixer), G heads of keys, d and v their sizes, B
blocks, s positions in one of the chunk cache, Y positions of a sequence.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from expertwire.kernels.ops.recurrent import Piece, StateMetadata, pieces
from expertwire.kernels.ops.variants import CHUNK

EPS = 1e-6  # added to the sums of squares of q and k


class DeltaCache(NamedTuple):
    """States, and the inputs of the chunks that are not full; all fp32.

    Attributes:
        state_BHdv: in blocks of the state cache.
        k_BsGd: keys, divided by their norm. This and what follows is in blocks of the chunk cache.
        u_BsHv: what a token adds to the state at its key.
        g_BsH: logarithm of a token's decay.
    """

    state_BHdv: Tensor
    k_BsGd: Tensor
    u_BsHv: Tensor
    g_BsH: Tensor


class GatedDeltaRule(Protocol):
    """See `reference`."""

    def __call__(
        self,
        qkv_TD: Tensor,
        a_TH: Tensor,
        b_TH: Tensor,
        A_H: Tensor,
        dt_bias_H: Tensor,
        cache: DeltaCache,
        states: StateMetadata,
    ) -> Tensor:
        """Return o_TD; write the cache."""
        ...


def reference(
    qkv_TD: Tensor,
    a_TH: Tensor,
    b_TH: Tensor,
    A_H: Tensor,
    dt_bias_H: Tensor,
    cache: DeltaCache,
    states: StateMetadata,
) -> Tensor:
    """Compute one token at a time, in fp32; return o_TD [T, H v] in the dtype of qkv.

    Args:
        qkv_TD: q [G d] | k [G d] | v [H v] of each token after the convolution, fp32 or bf16.
        a_TH, b_TH: of decay and beta, fp32 or bf16; rows may lie apart.
        A_H, dt_bias_H: fp32; A is negative.
        cache: written.
        states: of the step, with `chunk_blocks_S`.
    """
    assert states.chunk_blocks_S is not None, "no blocks of the chunk cache"
    o_TD = torch.empty_like(qkv_TD[:, : cache.u_BsHv.shape[2:].numel()])
    for piece in pieces(states):
        rows = range(piece.row, piece.row + piece.end - piece.start)
        tokens = [_token(qkv_TD[row], a_TH[row], b_TH[row], A_H, dt_bias_H, cache) for row in rows]
        o_TD[rows.start : rows.stop] = _advance(tokens, piece, int(states.chunk_blocks_S[piece.number]), cache)
    return o_TD


def split(qkv_TD: Tensor, num_keys: int, key_size: int, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q_TGd, k_TGd and v_THv."""
    width = num_keys * key_size
    q_TD, k_TD, v_TD = qkv_TD.split((width, width, qkv_TD.shape[1] - 2 * width), -1)
    heads = ((q_TD, num_keys), (k_TD, num_keys), (v_TD, num_heads))
    q_TGd, k_TGd, v_THv = (x.unflatten(1, (num, -1)) for x, num in heads)
    return q_TGd, k_TGd, v_THv


class _Token(NamedTuple):
    q_Gd: Tensor
    k_Gd: Tensor
    v_Hv: Tensor
    g_H: Tensor
    beta_H: Tensor


def _token(qkv_D: Tensor, a_H: Tensor, b_H: Tensor, A_H: Tensor, dt_bias_H: Tensor, cache: DeltaCache) -> _Token:
    (num_keys, key_size), num_heads = cache.k_BsGd.shape[2:], len(A_H)
    q_Gd, k_Gd, v_Hv = (x[0] for x in split(qkv_D[None].float(), num_keys, key_size, num_heads))
    q_Gd, k_Gd = (x_Gd * torch.rsqrt(x_Gd.square().sum(-1, keepdim=True) + EPS) for x_Gd in (q_Gd, k_Gd))
    g_H = A_H * F.softplus(a_H.float() + dt_bias_H)
    return _Token(q_Gd * key_size**-0.5, k_Gd, v_Hv, g_H, b_H.float().sigmoid())


def _advance(tokens: list[_Token], piece: Piece, block: int, cache: DeltaCache) -> Tensor:
    """Compute the tokens of a piece; return o_TD.

    Shapes depend only on a token's place in its chunk, so that its bits do too.
    """
    source_Hdv = cache.state_BHdv[piece.source]
    state_Hdv = source_Hdv.clone() if piece.source >= 0 else torch.zeros_like(source_Hdv)
    outputs = []
    for token, position in zip(tokens, range(piece.start, piece.end), strict=True):
        place = position % CHUNK
        chunk = (tensor_Bs[block, : place + 1] for tensor_Bs in cache[1:])
        outputs.append(_step(token, state_Hdv, *chunk))
        if place == CHUNK - 1:
            chunk = (tensor_Bs[block] for tensor_Bs in cache[1:])
            state_Hdv = _move_on(state_Hdv, *chunk)
    cache.state_BHdv[piece.target] = state_Hdv
    return torch.stack(outputs).flatten(1)


def _step(token: _Token, state_Hdv: Tensor, k_YGd: Tensor, u_YHv: Tensor, g_YH: Tensor) -> Tensor:
    """Write the last row of the chunk's tensors, which end with this token; return its o_Hv."""
    group = len(state_Hdv) // len(token.k_Gd)
    k_YGd[-1], g_YH[-1] = token.k_Gd, token.g_H
    decay_YH = g_YH.cumsum(0)
    q_H1d, k_H1d = (x_Gd.repeat_interleave(group, 0)[:, None] for x_Gd in (token.q_Gd, token.k_Gd))
    keys_HdY = k_YGd.repeat_interleave(group, 1).permute(1, 2, 0)
    weights_H1Y, values_HYv = (decay_YH[-1] - decay_YH).exp().T[:, None], u_YHv.transpose(0, 1)
    decay_H11 = decay_YH[-1].exp()[:, None, None]
    known_H1v = decay_H11 * (k_H1d @ state_Hdv)
    known_H1v = known_H1v + (weights_H1Y * (k_H1d @ keys_HdY))[..., :-1] @ values_HYv[:, :-1]
    u_YHv[-1] = token.beta_H[:, None] * (token.v_Hv - known_H1v[:, 0])
    return (decay_H11 * (q_H1d @ state_Hdv) + (weights_H1Y * (q_H1d @ keys_HdY)) @ values_HYv)[:, 0]


def _move_on(state_Hdv: Tensor, k_YGd: Tensor, u_YHv: Tensor, g_YH: Tensor) -> Tensor:
    """Return the state after a whole chunk."""
    decay_YH = g_YH.cumsum(0)
    keys_YHd = k_YGd.repeat_interleave(len(state_Hdv) // k_YGd.shape[1], 1)
    weighted_YHd = (decay_YH[-1] - decay_YH).exp()[..., None] * keys_YHd
    return decay_YH[-1].exp()[:, None, None] * state_Hdv + weighted_YHd.permute(1, 2, 0) @ u_YHv.transpose(0, 1)
