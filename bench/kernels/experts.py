"""The expert layers of `bench kernels`: random routing and weights of real shapes, our two products, and the peers'.

T tokens, K experts a token, U distinct tokens on this rank, R routed rows here, e local experts, D
model width, F expert width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from expertwire.bench.kernels import models, reference_formats
from expertwire.bench.kernels.measure import Call, Item, TensorRng, Timed, TimedCalls, copies, last_line, replicas
from expertwire.bench.kernels.models import TOKENS, Model
from expertwire.kernels.gpu import formats, grouped_gemm, grouped_gemm_tiles, quantize
from expertwire.kernels.gpu.formats import ExpertWeights
from expertwire.kernels.gpu.grouped_gemm import RoutedRows
from expertwire.kernels.ops import permute
from expertwire.kernels.ops.experts import Activation

QUICK_TOKENS = (1, 8, 32, 64, 512, 4096, 8192)
SLICE_TOKENS = (1, 8, 64, 512, 4096)
APART_TOKENS = (64, 4096, 8192)  # where the two products are timed one by one too
LOOP_TOKENS = (1, 8, 64, 512, 4096, 8192)


@dataclass(frozen=True, kw_only=True)
class Routed:
    """A rank's share of a random routing. The host knows the counts, for peers and floors."""

    ids_TK: Tensor  # of all tokens, i64
    row_index_R: Tensor
    home_R: Tensor
    offsets: Tensor  # i32 [e + 1]
    counts: list[int]
    num_tokens: int  # U
    planned: int

    @property
    def num_touched(self) -> int:
        return sum(count > 0 for count in self.counts)


def route(rng: TensorRng, model: Model, ep: int, num_tokens: int) -> Routed:
    """Route `num_tokens` tokens of each of `ep` ranks to K random experts each; return the first rank's share."""
    num_local, planned = model.local_experts(ep), num_tokens * model.top_k
    if rng.is_meta:
        index = rng.integers(0, 1, planned)
        return Routed(
            ids_TK=rng.integers(0, 1, num_tokens, model.top_k, dtype=torch.int64),
            row_index_R=index,
            home_R=index,
            offsets=rng.integers(0, 1, num_local + 1),
            counts=[0] * num_local,
            num_tokens=num_tokens if ep == 1 else planned,
            planned=planned,
        )
    ids_TK = rng.uniform(0, 1, num_tokens * ep, model.num_experts).topk(model.top_k, dim=-1).indices
    here_TK = ids_TK < num_local
    local_UK = torch.where(here_TK, ids_TK, -1)[here_TK.any(1)]
    done = permute.reference(local_UK, num_local)
    num_rows = int(done.expert_offsets[-1])
    # The combine layout holds only rows that there are, token by token.
    slots = (local_UK >= 0).flatten().cumsum(0) - 1
    return Routed(
        ids_TK=ids_TK,
        row_index_R=done.row_index_N[:num_rows].contiguous(),
        home_R=slots[done.home_N[:num_rows].long()].int(),
        offsets=done.expert_offsets,
        counts=done.expert_offsets.diff().tolist(),
        num_tokens=len(local_UK),
        planned=planned,
    )


def random_weights(rng: TensorRng, format: str, e: int, M: int, K: int) -> ExpertWeights:
    """Return random bits that are weights of this format: their values do not affect the time."""
    shape = reference_formats.meta_weights(format, e, M, K)
    if format == "dense":
        return ExpertWeights(format=format, data=rng.normal(e, M, K, scale=K**-0.5))
    assert shape.scales is not None, f"{format} has scales"
    if shape.data.dtype == torch.int32:
        data = rng.integers(-(2**31), 2**31 - 1, *shape.data.shape)
    else:
        data = rng.normal(*shape.data.shape, dtype=shape.data.dtype)
    return dataclasses.replace(
        shape,
        data=data,
        scales=_random_scales(rng, shape.scales, K),
        global_scales=None if format in ("int4", "fp8_block", "fp8_row") else rng.uniform(1, 2, e) * 2.0**26,
    )


def _random_scales(rng: TensorRng, like: Tensor, K: int) -> Tensor:
    if like.dtype == torch.uint8:  # exponents
        return rng.integers(116, 120, *like.shape, dtype=torch.uint8)
    return (rng.uniform(0.5, 1, *like.shape) * K**-0.5).to(like.dtype)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Expert weights of a rank, as our kernels read them."""

    w13: ExpertWeights
    w2: ExpertWeights
    activation: Activation
    bias13: Tensor | None = None
    bias2: Tensor | None = None

    @classmethod
    def random(cls, rng: TensorRng, model: Model, format: str, ep: int) -> Layer:
        e, activation = model.local_experts(ep), Activation(model.activation)
        hidden = 2 * model.F if activation.gated else model.F
        return cls(
            w13=random_weights(rng, format, e, hidden, model.D),
            w2=random_weights(rng, format, e, model.D, model.F),
            activation=activation,
            bias13=rng.normal(e, hidden) if model.biases else None,
            bias2=rng.normal(e, model.D) if model.biases else None,
        )


def as_rows(routed: Routed, format: str) -> RoutedRows:
    """Return rows with the tile map, which is part of the routing's metadata, not of the products."""
    return RoutedRows.of(routed.row_index_R, routed.home_R, routed.offsets, routed.planned, format)


def random_x(rng: TensorRng, format: str, num_tokens: int, D: int) -> tuple[Tensor, Tensor | None]:
    """Return tokens as the first product takes them, with scales that are not yet in the order of tiles."""
    if format == "fp8_block":
        scales = rng.uniform(0.01, 0.02, num_tokens, -(-D // formats.BLOCK))
        return rng.normal(num_tokens, D, dtype=formats.FP8), scales
    if format == "fp8_row":
        return rng.normal(num_tokens, D, dtype=formats.FP8), rng.uniform(0.01, 0.02, num_tokens)
    return rng.normal(num_tokens, D), None


def first_product(rng: TensorRng, layer: Layer, rows: RoutedRows, x: Tensor, x_scales: Tensor | None) -> Tensor:
    """Return the hidden layer; scales are brought into the order of tiles where needed."""
    if layer.w13.format == "fp8_block":
        assert x_scales is not None
        x_scales = grouped_gemm_tiles.tile_scales(x_scales, rows.row_index_R, rows.expert_offsets, rows.tile_map)
    return grouped_gemm.w13(
        x, rows, layer.w13, layer.activation, rng.gpu, bias_eF=layer.bias13, x_scales=x_scales, out_dtype=rng.dtype
    )


def second_operand(layer: Layer, rows: RoutedRows, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the hidden layer as the second product takes it."""
    format = layer.w2.format
    if format == "fp8_block":
        values, scales = quantize.quantize(hidden, formats.BLOCK)
        return values, grouped_gemm_tiles.tile_scales(scales, None, rows.expert_offsets, rows.tile_map)
    if format == "fp8_row":
        values, scales = quantize.quantize(hidden, hidden.shape[1])
        return values, scales[:, 0]
    return hidden, None


def second_product(rng: TensorRng, layer: Layer, rows: RoutedRows, hidden: Tensor, scales: Tensor | None) -> Tensor:
    """Return rows in the combine layout."""
    out = hidden.new_empty(len(rows.home_R), layer.w2.shape[1], dtype=rng.dtype)
    return grouped_gemm.w2(hidden, rows, layer.w2, out, rng.gpu, bias_eD=layer.bias2, x_scales=scales)


def pair(rng: TensorRng, layer: Layer, rows: RoutedRows, x: Tensor, x_scales: Tensor | None) -> Call:
    """Return a call of both products and what runs between them."""

    def call() -> Tensor:
        hidden, scales = second_operand(layer, rows, first_product(rng, layer, rows, x, x_scales))
        return second_product(rng, layer, rows, hidden, scales)

    return call


def apart(rng: TensorRng, layer: Layer, rows: RoutedRows, x: Tensor, x_scales: Tensor | None) -> dict[str, Call]:
    """Return calls of the two products alone, with their operands ready."""
    hidden, scales = second_operand(layer, rows, first_product(rng, layer, rows, x, x_scales))
    if layer.w13.format == "fp8_block":
        assert x_scales is not None
        x_scales = grouped_gemm_tiles.tile_scales(x_scales, rows.row_index_R, rows.expert_offsets, rows.tile_map)
    options: dict[str, Any] = {"bias_eF": layer.bias13, "x_scales": x_scales, "out_dtype": rng.dtype}
    return {
        "w13": lambda: grouped_gemm.w13(x, rows, layer.w13, layer.activation, rng.gpu, **options),
        "w2": lambda: second_product(rng, layer, rows, hidden, scales),
    }


def grouped_mm(layer: Layer, routed: Routed, x: Tensor) -> Call:
    """Return a call of `torch.nn.functional.grouped_mm` with its gather and activation; rows stay sorted by expert."""
    w13_eDF, w2_eFD = layer.w13.data.transpose(1, 2), layer.w2.data.transpose(1, 2)
    index, ends = routed.row_index_R.long(), routed.offsets[1:].contiguous()

    def call() -> Tensor:
        gate, up = F.grouped_mm(x.index_select(0, index), w13_eDF, offs=ends).chunk(2, dim=-1)
        return F.grouped_mm(F.silu(gate) * up, w2_eFD, offs=ends)

    return call


def matmul_loop(layer: Layer, routed: Routed, x: Tensor) -> Call:
    """Return a call of `torch.matmul` for each expert; the host knows the counts, so the loop does not wait."""
    index = routed.row_index_R.long()
    spans, end = [], 0
    for e, count in enumerate(routed.counts):
        end += count
        if count:
            spans.append((e, end - count, end))

    def call() -> Tensor:
        x_RD = x.index_select(0, index)
        out = x_RD.new_empty(len(index), layer.w2.shape[1])
        for e, start, stop in spans:
            gate, up = (x_RD[start:stop] @ layer.w13.data[e].T).chunk(2, dim=-1)
            torch.matmul(F.silu(gate) * up, layer.w2.data[e].T, out=out[start:stop])
        return out

    return call


def transformers_layer(model: Model, layer: Layer) -> Any:
    """Return transformers' fused experts with our weights.

    Raises:
        Exception: whatever their construction raises; the interface changes from version to version.
    """
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        num_experts=model.num_experts, hidden_size=model.D, moe_intermediate_size=model.F, hidden_act="silu"
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj = torch.nn.Parameter(layer.w13.data, requires_grad=False)
    module.down_proj = torch.nn.Parameter(layer.w2.data, requires_grad=False)
    return module


def transformers_layers(model: Model, layers: list[Layer]) -> tuple[list[Any], str]:
    """Return one for each of our layers and "", or none and the reason: a missing peer must not fail our own timing."""
    try:
        return [transformers_layer(model, layer) for layer in layers], ""
    except Exception as error:  # noqa: BLE001 - whatever another package raises is its result
        return [], last_line(error)


def transformers_call(module: Any, routed: Routed, x: Tensor) -> Call:
    """Return a call of transformers' experts, with its own sort and weighted sum."""
    weights_TK = torch.full(routed.ids_TK.shape, 1 / routed.ids_TK.shape[1], dtype=x.dtype, device=x.device)
    return lambda: module(x, routed.ids_TK, weights_TK)


def layer_work(rng: TensorRng, model: Model, format: str, ep: int, num_tokens: int, quick: bool) -> TimedCalls:
    """Time our pair and, for dense weights without biases, the peers; transformers, slow to import, not if quick."""
    layer_bytes = model.layer_bytes(format, ep)
    e = model.local_experts(ep)
    expected = models.touched(model.num_experts, model.top_k, num_tokens * ep) / ep
    number = 1 if rng.is_meta else replicas(layer_bytes * expected / e)
    layers = [Layer.random(rng, model, format, ep) for _ in range(1 if rng.is_meta else copies(layer_bytes))]
    routeds = [route(rng, model, ep, num_tokens) for _ in range(number)]
    most = max(routed.num_tokens for routed in routeds)
    xs = [random_x(rng, format, most, model.D) for _ in range(1 if rng.is_meta else 2)]
    calls: dict[str, list[Call]] = {}
    with_peers = format == "dense" and model.activation == "swiglu" and not rng.is_meta
    modules, missing = transformers_layers(model, layers) if with_peers and ep == 1 and not quick else ([], "")
    for i, routed in enumerate(routeds):
        layer, rows = layers[i % len(layers)], as_rows(routed, format)
        every_x, every_scale = xs[i % len(xs)]
        x, x_scales = every_x[: routed.num_tokens], None if every_scale is None else every_scale[: routed.num_tokens]
        found: dict[str, Call] = {"ours": pair(rng, layer, rows, x, x_scales)}
        if num_tokens in APART_TOKENS or format.startswith("fp8"):
            found |= apart(rng, layer, rows, x, x_scales)
        if with_peers:
            found["grouped_mm"] = grouped_mm(layer, routed, x)
        if with_peers and num_tokens in LOOP_TOKENS:
            found["matmul loop"] = matmul_loop(layer, routed, x)
        if modules:
            found["transformers"] = transformers_call(modules[i % len(layers)], routed, x)
        for name, call in found.items():
            calls.setdefault(name, []).append(call)
    work = TimedCalls(calls=calls, peers=frozenset(calls) - {"ours", "w13", "w2"}, **_cost(model, format, ep, routeds))
    return (
        dataclasses.replace(work, labels={**work.labels, "not compared": f"transformers: {missing}"})
        if missing
        else work
    )


def _cost(model: Model, format: str, ep: int, routeds: list[Routed]) -> dict[str, Any]:
    """Return the cost and the labels of the mean replica."""
    number = len(routeds)
    rows = sum(len(routed.row_index_R) for routed in routeds) / number
    seen = sum(routed.num_tokens for routed in routeds) / number
    num_touched = sum(routed.num_touched for routed in routeds) / number
    labels = {
        "model": model.name,
        "format": format,
        "ep": ep,
        "tokens": routeds[0].planned // model.top_k,
        "rows": rows,
        "touched": num_touched,
    }
    return {"cost": models.experts_cost(model, format, seen, rows, num_touched), "labels": labels}


SERIES: Mapping[str, list[tuple[Model, str, int]]] = {
    "experts-qwen3": [(models.QWEN3, "dense", 1)],
    "experts-deepseek": [(models.DEEPSEEK, "fp8_block", 8), (models.DEEPSEEK, "fp8_block", 1)],
    "experts-gpt-oss": [(models.GPT_OSS, "mxfp4", 1), (models.QWEN3, "int4", 1)],
    "experts-more": [
        (models.MIXTRAL, "dense", 1),
        (models.DEEPSEEK, "fp8_block", 64),
        (models.KIMI, "fp8_block", 8),
        (models.KIMI, "fp8_block", 64),
        (models.QWEN3, "dense", 8),
        (models.QWEN3, "dense", 64),
        (models.MIXTRAL, "dense", 8),
        (models.GPT_OSS, "mxfp4", 8),
        (models.GPT_OSS, "mxfp4", 64),
        (models.KIMI, "fp8_block", 1),
        (models.MIXTRAL, "fp8_row", 1),
        (models.DEEPSEEK, "nvfp4", 8),
    ],
}


def items(suite: str, quick: bool) -> list[Item]:
    """Return the items of a suite in `SERIES`: token counts with bars first, then the others."""
    found: list[Item] = []
    for model, format, ep in SERIES[suite]:
        first = SERIES[suite][0] == (model, format, ep)
        tokens = SLICE_TOKENS if not first else QUICK_TOKENS if quick else TOKENS
        if suite == "experts-more" and not quick and ep == 1:
            tokens = QUICK_TOKENS
        ordered = sorted(tokens, key=lambda number: number not in QUICK_TOKENS)
        found += [_item(model, format, ep, number, quick) for number in ordered]
    return found


def _item(model: Model, format: str, ep: int, num_tokens: int, quick: bool) -> Timed:
    key = f"{model.name} {format} EP{ep} T{num_tokens}"
    return Timed(key, lambda rng: layer_work(rng, model, format, ep, num_tokens, quick))
