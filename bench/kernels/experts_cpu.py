"""`python -m expertwire.bench.kernels.experts_cpu`: the routed experts on a CPU beside transformers' implementations of them.

A random Qwen3-MoE layer of 512 wide (32 experts, top-4, of width 256) at 1, 16, 64 and 256 tokens, in fp32 and bf16. Everything
runs in one process on one thread, by turns within a round, so that a noisy machine is noisy for all; time is the processor time
of the process, and what counts is the ratio within a round. Calls go over several layers of weights, as they do in a model.

`experts` is: tokens, and which experts they go to -> their mixture. `layer` adds the router before it, and the residual and
the norm behind it. Ours are those of the engine on one rank, sorting, gathering and combining included.

T tokens, D model width, F expert width, E experts, K experts a token, R routed
rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertwire.bench.serving import throughput
from expertwire.comm.all_to_all.base import AllToAllSpec
from expertwire.comm.all_to_all.reference import ReferenceAllToAll
from expertwire.comm.group import SoloGroup
from expertwire.kernels import registry
from expertwire.kernels.ops import rms_norm, routing
from expertwire.kernels.ops.experts import GroupedMlpWeights
from expertwire.kernels.ops.variants import Routing
from expertwire.moe import reference
from expertwire.moe.eplb.placement import place
from expertwire.moe.layer import MoeLayer, prepare

D, F, E, K, EPS = 512, 256, 32, 4, 1e-6
TOKENS = (1, 16, 64, 256)
DTYPES = (torch.float32, torch.bfloat16)
NUM_LAYERS = 4  # 200 MB in fp32: more than a core's own caches
BATCHED_TOKENS = 16  # batched_mm copies the weights of every row: unusable above
_MARGIN = 0.05  # between the logits of the last expert chosen and the next one

Call = Callable[["Step"], Tensor]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights of one layer: [E, D], [E, 2F, D], [E, D, F], [D]."""

    router: Tensor
    w13: Tensor
    w2: Tensor
    norm: Tensor


@dataclass(frozen=True, kw_only=True)
class Step:
    """Inputs of one layer."""

    layer: int
    x_TD: Tensor
    ids_TK: Tensor
    weights_TK: Tensor


def main() -> int:
    """Check, measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with torch.inference_mode():
        for dtype in DTYPES:
            layers = [random_layer(seed, dtype) for seed in range(NUM_LAYERS)]
            for num_tokens in args.tokens:
                rows += measure(layers, num_tokens, args.rounds)
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps({"machine": throughput.machine("cpu"), "rows": rows}, indent=1) + "\n")
    return 0


def random_layer(seed: int, dtype: torch.dtype) -> Weights:
    """Weights that keep the size of what goes through them, and spread tokens over all experts."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    return Weights(router=normal(E, D), w13=normal(E, 2 * F, D), w2=normal(E, D, F), norm=torch.ones(D, dtype=dtype))


def random_steps(layers: Sequence[Weights], num_tokens: int, seed: int) -> list[Step]:
    """Return a random step for each layer, routed by it; no token is so near to other experts that rounding decides."""
    generator = torch.Generator().manual_seed(seed)
    steps = []
    for i, layer in enumerate(layers):
        x_TD = torch.randn(4 * num_tokens + 16, D, generator=generator).to(layer.router.dtype)
        best = (x_TD.float() @ layer.router.float().T).topk(K + 1).values
        x_TD = x_TD[best[:, K - 1] - best[:, K] > _MARGIN][:num_tokens]
        assert len(x_TD) == num_tokens, f"{len(x_TD)} tokens are clear, {num_tokens} were wanted"
        ids_TK, weights_TK = routing.reference(x_TD @ layer.router.T, Routing(top_k=K, renormalize=True))
        steps.append(Step(layer=i, x_TD=x_TD, ids_TK=ids_TK, weights_TK=weights_TK))
    return steps


def measure(layers: Sequence[Weights], num_tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Return a row for `experts` and one for `layer`, after a check of every implementation."""
    rows = []
    for what, ours, theirs in (
        ("experts", our_experts(layers), their_experts(layers, num_tokens)),
        ("layer", our_layers(layers), their_layers(layers, num_tokens)),
    ):
        calls = {**ours, **theirs}
        steps = random_steps(layers, num_tokens, 1000)
        errors = {name: check(call, what, layers, steps) for name, call in calls.items()}
        seconds = _seconds(calls, layers, num_tokens, rounds)
        rows.append(_summary(what, layers[0].w13.dtype, num_tokens, steps, seconds, errors, list(theirs)))
        print(_line(rows[-1]), file=sys.stderr, flush=True)
    return rows


def our_experts(layers: Sequence[Weights]) -> dict[str, Call]:
    """Sorting, gathering, the experts, and combining, as `MoeLayer` calls them."""
    moes = [_moe(layer) for layer in layers]

    def call(step: Step) -> Tensor:
        moe, exchange = moes[step.layer], moes[step.layer].all_to_alls[0]
        handle = exchange.dispatch_send(step.x_TD, step.ids_TK, [len(step.x_TD)])
        arrived = exchange.dispatch_recv(handle)
        y_RD = moe.experts(arrived.x_UD, arrived.row_index_R, arrived.expert_offsets, arrived.home_R)
        return moe.ops.combine(exchange.combine_recv(exchange.combine_send(handle, y_RD)), step.weights_TK)

    return {"ours": call}


def our_layers(layers: Sequence[Weights]) -> dict[str, Call]:
    """`MoeLayer.forward`, on rows that are their own residual."""
    moes = [_moe(layer) for layer in layers]
    return {"ours": lambda step: moes[step.layer].forward(step.x_TD, step.x_TD, [len(step.x_TD)])[1]}


def _moe(weights: Weights) -> MoeLayer:
    placement = place(E, 1, 0)
    spec = AllToAllSpec(
        group=SoloGroup(),
        rank_offsets=placement.rank_offsets,
        max_tokens=4096,
        hidden_size=D,
        top_k=K,
        dtype=weights.w13.dtype,
    )
    return prepare(
        weights.router,
        GroupedMlpWeights(weights.w13, weights.w2),
        weights.norm,
        ops=registry.cpu(),
        routing=Routing(top_k=K, renormalize=True),
        eps=EPS,
        placement=placement,
        rank=0,
        all_to_alls=[ReferenceAllToAll(spec)],
    )


def their_experts(layers: Sequence[Weights], num_tokens: int) -> dict[str, Call]:
    """transformers' `Qwen3MoeExperts`, with each of its implementations for a CPU."""

    def variant(name: str) -> Call:
        blocks = [_their_block(layer, name) for layer in layers]
        return lambda step: blocks[step.layer].experts(step.x_TD, step.ids_TK, step.weights_TK.to(step.x_TD.dtype))

    return {name: variant(name) for name in _variants(num_tokens)}


def their_layers(layers: Sequence[Weights], num_tokens: int) -> dict[str, Call]:
    """transformers' sparse block, the addition and its norm."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

    def variant(name: str) -> Call:
        blocks = [_their_block(layer, name) for layer in layers]
        norm = Qwen3MoeRMSNorm(D, EPS).to(layers[0].norm.dtype)
        return lambda step: norm(step.x_TD + blocks[step.layer](step.x_TD[None])[0])

    return {name: variant(name) for name in _variants(num_tokens)}


def _variants(num_tokens: int) -> tuple[str, ...]:
    return ("eager", "grouped_mm", "batched_mm")[: 3 if num_tokens <= BATCHED_TOKENS else 2]


def _their_block(weights: Weights, variant: str) -> Any:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=D, num_experts=E, num_experts_per_tok=K, moe_intermediate_size=F, norm_topk_prob=True
    )
    config._experts_implementation = variant
    with torch.device("meta"):
        block = Qwen3MoeSparseMoeBlock(config)
    block.gate.weight = torch.nn.Parameter(weights.router, requires_grad=False)
    block.experts.gate_up_proj = torch.nn.Parameter(weights.w13, requires_grad=False)
    block.experts.down_proj = torch.nn.Parameter(weights.w2, requires_grad=False)
    return block.eval()


def check(call: Call, what: str, layers: Sequence[Weights], steps: Sequence[Step]) -> float:
    """Return the largest difference from the fp32 reference, in units of the reference's largest value.

    Raises:
        ValueError: it is more than rounding can explain.
    """
    worst = 0.0
    for step in steps:
        layer, x_TD = layers[step.layer], step.x_TD.float()
        wide = (tensor.float() for tensor in (layer.w13, layer.w2))
        expected = reference.moe(x_TD, step.ids_TK, step.weights_TK, *wide)
        if what == "layer":
            expected = rms_norm.reference(x_TD + expected, layer.norm.float(), EPS)
        worst = max(worst, float((call(step).float() - expected).abs().max() / expected.abs().max()))
    allowed = 1e-5 if steps[0].x_TD.dtype == torch.float32 else 2e-2
    if worst > allowed:
        raise ValueError(f"{what} is off by {worst:.1e} of the largest value, allowed is {allowed:.1e}")
    return worst


def _seconds(calls: dict[str, Call], layers: Sequence[Weights], num_tokens: int, rounds: int) -> dict[str, list[float]]:
    """Processor time of a call, round by round; every round has fresh tokens, the same for all."""
    repeats = max(1, 64 // num_tokens)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        steps = [step for i in range(repeats) for step in random_steps(layers, num_tokens, turn * repeats + i)]
        names = list(calls)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            call = calls[name]
            for step in steps[:NUM_LAYERS]:
                call(step)
            start = time.process_time()
            for step in steps:
                call(step)
            seconds[name].append((time.process_time() - start) / len(steps))
    return seconds


def _summary(
    what: str,
    dtype: torch.dtype,
    num_tokens: int,
    steps: Sequence[Step],
    seconds: dict[str, list[float]],
    errors: dict[str, float],
    theirs: Sequence[str],
) -> dict[str, Any]:
    flops = num_tokens * K * 3 * 2 * D * F
    touched = statistics.mean(len(step.ids_TK.unique()) for step in steps) * 3 * D * F * dtype.itemsize
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    fastest = min(theirs, key=medians.__getitem__)
    ratios = [other / own for own, other in zip(seconds["ours"], seconds[fastest], strict=True)]
    return {
        "what": what,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": num_tokens,
        "us": {name: 1e6 * value for name, value in medians.items()},
        "gflops": {name: flops / value / 1e9 for name, value in medians.items()},
        "gbytes": {name: touched / value / 1e9 for name, value in medians.items()},
        "error": errors,
        "fastest_peer": fastest,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "us_of_rounds": {name: [1e6 * value for value in values] for name, values in seconds.items()},
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Medians; the last columns are the median and the range of (fastest peer's time / ours) of the rounds."""
    return "\n".join(
        ["what    dtype    tokens  us of each; GF/s and GB/s of ours; ratio [of the rounds]", *map(_line, rows)]
    )


def _line(row: dict[str, Any]) -> str:
    us = "  ".join(f"{name} {value:7.0f}" for name, value in row["us"].items())
    rates = f"{row['gflops']['ours']:.0f} GF/s {row['gbytes']['ours']:.1f} GB/s"
    ratio = f"{row['ratio']:.2f}x {row['fastest_peer']} [{min(row['ratios']):.2f}-{max(row['ratios']):.2f}]"
    return f"{row['what']:<7} {row['dtype']:<8} {row['tokens']:>6}  {us}; {rates}; {ratio}"


if __name__ == "__main__":
    sys.exit(main())
