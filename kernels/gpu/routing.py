"""Choice of experts, in one launch: `kernels.ops.routing` in Triton.

A program of one warp takes a few tokens. Scores become integers of the same order, with the
expert's id in the lower bits, so one maximum finds the best expert and settles ties; this is
repeated K times. Only the chosen logits are then converted to weights. The same launch looks up
each chosen expert's replica and adds up the experts' load, by integer atomics, whose sum is the
same in any order.

T tokens, E experts, in the kernel in groups padded to a power of two, K experts a token, Q the
period with which tokens rotate through replicas.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.dependent_launch import PDL, wait_for_previous_kernel
from expertwire.kernels.ops.routing import TINY, Routed
from expertwire.kernels.ops.variants import Routing

_SCORES = {"softmax": 0, "sigmoid": 1, "sqrt_softplus": 2}
_SOFTMAX, _SIGMOID = tl.constexpr(0), tl.constexpr(1)
_LOWEST = tl.constexpr(-(2**63))
_TINY = tl.constexpr(TINY)


@triton.jit
def _ordered(x):
    """Return integers in the order of fp32 numbers; both zeros are equal, and NaN is below all."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x == x, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), -0x7FFFFFFF)


@triton.jit
def _ranked(x, position, SIZE: tl.constexpr):
    """Return one unique integer a number: larger for larger `x`, and of equals for the lower position."""
    return (_ordered(x).to(tl.int64) << 32) | (SIZE - 1 - position).to(tl.int64)


@triton.jit
def _number(ranked):
    """Return the `x` of `_ranked`."""
    bits = (ranked >> 32).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _score(logits, largest, SCORE: tl.constexpr):
    """Return the score, or for softmax its numerator."""
    if SCORE == _SOFTMAX:
        return tl.exp(logits - largest)
    elif SCORE == _SIGMOID:
        return 1.0 / (1.0 + tl.exp(-logits))
    else:
        return tl.sqrt(tl.maximum(logits, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(logits))))


@triton.jit
def _keep_groups(
    ranked_TE,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    TWO_BEST: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    PADDED_GROUP_SIZE: tl.constexpr,
):
    TOKENS: tl.constexpr = ranked_TE.shape[0]
    ranked = tl.reshape(ranked_TE, TOKENS, PADDED_GROUPS, PADDED_GROUP_SIZE)
    best = tl.max(ranked, axis=2)
    score = _number(best)
    if TWO_BEST:
        score += _number(tl.max(tl.where(ranked == best[:, :, None], _LOWEST, ranked), axis=2))
    group = tl.arange(0, PADDED_GROUPS)[None, :]
    groups = tl.where(group < GROUPS, _ranked(score, group, PADDED_GROUPS), _LOWEST)
    for _ in tl.static_range(KEPT):
        groups = tl.where(groups == tl.max(groups, axis=1)[:, None], _LOWEST, groups)
    # Groups that were chosen are now the lowest, as are groups that do not exist.
    ranked = tl.where((groups == _LOWEST)[:, :, None], ranked, _LOWEST)
    return tl.reshape(ranked, TOKENS, PADDED_GROUPS * PADDED_GROUP_SIZE)


@triton.jit(do_not_specialize=["num_tokens"])
def route_kernel(
    logits_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    physical_ptr,  # None: no physical experts are wanted
    table_ptr,  # [num_replicas, E]
    load_ptr,  # None: nothing is counted
    valid_ptr,  # None: all tokens count
    num_tokens,
    stride_t,
    num_replicas,
    scale,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    SCORE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    TWO_BEST: tl.constexpr,
    TOKENS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    PADDED_GROUP_SIZE: tl.constexpr,
    PADDED_K: tl.constexpr,
):
    wait_for_previous_kernel()
    COLUMNS: tl.constexpr = PADDED_GROUPS * PADDED_GROUP_SIZE
    PER_GROUP: tl.constexpr = EXPERTS // GROUPS
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, COLUMNS)
    expert = (column // PADDED_GROUP_SIZE) * PER_GROUP + column % PADDED_GROUP_SIZE
    exists = (column // PADDED_GROUP_SIZE < GROUPS) & (column % PADDED_GROUP_SIZE < PER_GROUP)
    row_ptr = logits_ptr + t.to(tl.int64) * stride_t
    mask_TE = (t < num_tokens)[:, None] & exists[None, :]
    logits_TE = tl.load(row_ptr[:, None] + expert[None, :], mask=mask_TE, other=float("-inf")).to(tl.float32)
    largest_T = tl.max(logits_TE, axis=1)
    largest_T = tl.where(largest_T == float("-inf"), 0.0, largest_T)
    total_T = tl.full([TOKENS], 1.0, tl.float32)
    if SCORE == _SOFTMAX and (HAS_BIAS or not RENORMALIZE):
        total_T = tl.maximum(tl.sum(tl.exp(logits_TE - largest_T[:, None]), axis=1), _TINY)

    choice_TE = logits_TE
    if HAS_BIAS or TWO_BEST:
        choice_TE = _score(logits_TE, largest_T[:, None], SCORE) / total_T[:, None]
    if HAS_BIAS:
        choice_TE += tl.load(bias_ptr + expert, mask=exists, other=0.0)[None, :]
    ranked_TE = tl.where(exists[None, :], _ranked(choice_TE, column[None, :], COLUMNS), _LOWEST)
    if KEPT < GROUPS:
        ranked_TE = _keep_groups(ranked_TE, GROUPS, KEPT, TWO_BEST, PADDED_GROUPS, PADDED_GROUP_SIZE)

    k = tl.arange(0, PADDED_K)[None, :]
    ids_TK = tl.zeros([TOKENS, PADDED_K], tl.int32)
    for i in tl.static_range(K):
        best_T = tl.max(ranked_TE, axis=1)
        ranked_TE = tl.where(ranked_TE == best_T[:, None], _LOWEST, ranked_TE)
        best_column = COLUMNS - 1 - (best_T & 0xFFFFFFFF).to(tl.int32)
        best_id = (best_column // PADDED_GROUP_SIZE) * PER_GROUP + best_column % PADDED_GROUP_SIZE
        ids_TK = tl.where(k == i, best_id[:, None], ids_TK)

    mask_TK = (t < num_tokens)[:, None] & (k < K)
    if load_ptr is not None:
        counted = num_tokens if valid_ptr is None else tl.minimum(num_tokens, tl.load(valid_ptr))
        ones_TK = tl.full([TOKENS, PADDED_K], 1, tl.int64)
        tl.atomic_add(load_ptr + ids_TK, ones_TK, mask=mask_TK & (t < counted)[:, None], sem="relaxed")
    chosen_TK = tl.load(row_ptr[:, None] + ids_TK, mask=mask_TK, other=float("-inf")).to(tl.float32)
    weights_TK = tl.where(k < K, _score(chosen_TK, largest_T[:, None], SCORE), 0.0) / total_T[:, None]
    if RENORMALIZE:
        weights_TK = weights_TK / (tl.sum(weights_TK, axis=1) + _TINY)[:, None]
    at_TK = t.to(tl.int64)[:, None] * K + k
    tl.store(ids_ptr + at_TK, ids_TK.to(ids_ptr.dtype.element_ty), mask=mask_TK)
    tl.store(weights_ptr + at_TK, weights_TK * scale, mask=mask_TK)
    if physical_ptr is not None:
        replica_TK = (t % num_replicas)[:, None] * EXPERTS + ids_TK
        tl.store(physical_ptr + at_TK, tl.load(table_ptr + replica_TK, mask=mask_TK, other=-1), mask=mask_TK)


def constexprs(
    num_experts: int,
    routing: Routing,
    *,
    has_bias: bool,
) -> dict[str, int | bool]:
    groups, (number, kept) = routing.groups, _limits(routing)
    padded_groups, padded_group_size = triton.next_power_of_2(number), triton.next_power_of_2(num_experts // number)
    return {
        "EXPERTS": num_experts,
        "K": routing.top_k,
        "SCORE": _SCORES[routing.score],
        "HAS_BIAS": has_bias,
        "RENORMALIZE": routing.renormalize,
        "GROUPS": number,
        "KEPT": kept,
        "TWO_BEST": groups is not None and groups.by == "two_best",
        "TOKENS": max(1, 128 // (padded_groups * padded_group_size)),
        "PADDED_GROUPS": padded_groups,
        "PADDED_GROUP_SIZE": padded_group_size,
        "PADDED_K": triton.next_power_of_2(routing.top_k),
    }


def _limits(routing: Routing) -> tuple[int, int]:
    """Return the number of groups, and how many of them are kept."""
    return (1, 1) if routing.groups is None else (routing.groups.number, routing.groups.kept)


def route(logits_TE: Tensor, routing: Routing, bias_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run `kernels.ops.routing.reference`; logits fp32, bf16 or fp16 with contiguous rows, at most
    1024 experts.
    """
    routed = _launch(logits_TE, routing, bias_E, None, None, None)
    return routed.ids_TK, routed.weights_TK


def route_and_count(
    logits_TE: Tensor,
    routing: Routing,
    bias_E: Tensor | None = None,
    *,
    load_E: Tensor,
    log2phy_QE: Tensor | None = None,
    num_valid: Tensor | None = None,
) -> Routed:
    """Run `kernels.ops.routing.route_and_count`, in one launch."""
    assert load_E.is_contiguous() and load_E.dtype == torch.int64, (load_E.shape, load_E.dtype)  # noqa: PT018
    return _launch(logits_TE, routing, bias_E, load_E, log2phy_QE, num_valid)


def _launch(
    logits_TE: Tensor,
    routing: Routing,
    bias_E: Tensor | None,
    load_E: Tensor | None,
    log2phy_QE: Tensor | None,
    num_valid: Tensor | None,
) -> Routed:
    (num_tokens, num_experts), top_k = logits_TE.shape, routing.top_k
    number, kept = _limits(routing)
    assert num_experts % number == 0, f"{num_experts} experts in {number} groups"
    assert 0 < top_k <= kept * num_experts // number, f"{top_k} of {num_experts} experts, {kept} of {number} groups"
    assert num_experts <= 1024, f"{num_experts} experts"
    assert logits_TE.stride(1) == 1 or num_experts == 1, f"strides {logits_TE.stride()}"
    assert bias_E is None or (bias_E.shape == (num_experts,) and bias_E.dtype == torch.float32), bias_E
    ids_TK = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits_TE.device)
    weights_TK = torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits_TE.device)
    physical_TK, num_replicas = ids_TK, 1
    if log2phy_QE is not None:
        num_replicas = len(log2phy_QE)
        assert log2phy_QE.shape == (num_replicas, num_experts) and log2phy_QE.is_contiguous(), log2phy_QE  # noqa: PT018
        physical_TK = torch.empty_like(ids_TK)
    if num_tokens == 0:
        return Routed(ids_TK, weights_TK, physical_TK)
    sizes = constexprs(num_experts, routing, has_bias=bias_E is not None)
    route_kernel[(triton.cdiv(num_tokens, sizes["TOKENS"]),)](
        logits_TE,
        weights_TK if bias_E is None else bias_E,
        ids_TK,
        weights_TK,
        None if log2phy_QE is None else physical_TK,
        log2phy_QE,
        load_E,
        num_valid,
        num_tokens,
        logits_TE.stride(0),
        num_replicas,
        routing.scale,
        **sizes,
        num_warps=1,
        **PDL,
    )
    return Routed(ids_TK, weights_TK, physical_TK)
