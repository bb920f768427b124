"""The experts' MLP on a GPU, `kernels.ops.experts.GroupedMlp`: two grouped GEMMs, with row counts that
only the device knows.

fp8 weights meet rows that are quantised first: in groups of 128 columns for "fp8_block"
(DeepSeek-V3, arXiv 2412.19437, 3.3.2), by row for "fp8_row". 4-bit weights meet rows as they are.
With `scale_rows`, on Blackwell, rows are quantised to what its tensor cores take, so that weights
need not be converted to 16 bits. Rows of u8 are packed and already quantised in groups of 128
(`kernels.ops.quantize.pack`); "fp8_block" takes them too, and their results are bf16.

U distinct tokens of them, R rows that a rank receives, D model width, F expert width, e local experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expertwire.kernels.formats import QuantizedWeight
from expertwire.kernels.gpu import block_scaled_mma, formats, grouped_gemm, grouped_gemm_tiles, quantize
from expertwire.kernels.gpu.device import Device
from expertwire.kernels.gpu.formats import ExpertWeights
from expertwire.kernels.ops.experts import GroupedMlp, GroupedMlpWeights
from expertwire.kernels.ops.permute import TileMap
from expertwire.kernels.ops.quantize import unpack
from expertwire.kernels.ops.variants import Activation


@dataclass(frozen=True, kw_only=True, eq=False)
class GpuExperts:
    """Weights as the kernels read them, both in one format."""

    w13: ExpertWeights
    w2: ExpertWeights
    activation: Activation
    bias13_eF: Tensor | None
    bias2_eD: Tensor | None
    device: Device
    expected: float = 1.0  # share of the rows that there can be
    reserved_sms: int = 0

    @property
    def weights(self) -> tuple[Tensor, ...]:
        arrays = [(weights.data, weights.scales, weights.global_scales) for weights in (self.w13, self.w2)]
        every = *arrays[0], *arrays[1], self.bias13_eF, self.bias2_eD
        return tuple(tensor for tensor in every if tensor is not None)

    def __call__(
        self,
        x_UD: Tensor,
        row_index_R: Tensor,
        offsets: Tensor | np.ndarray,
        home_R: Tensor | None = None,
        tile_map: TileMap | None = None,
    ) -> Tensor:
        """Run `GroupedMlp`. Offsets on the host are copied to the device, and all rows are assumed to be there."""
        format, planned = self.w13.format, len(row_index_R)
        if isinstance(offsets, np.ndarray):
            offsets = torch.from_numpy(offsets.astype(np.int32)).to(x_UD.device)
        else:
            planned = math.ceil(self.expected * planned)
        if home_R is None:
            home_R = torch.arange(len(row_index_R), dtype=torch.int32, device=x_UD.device)
        tokens = grouped_gemm_tiles.token_tile(format, planned, len(offsets) - 1)
        fitting = tile_map if tile_map is not None and tile_map.token_tile == tokens else None
        rows = grouped_gemm_tiles.RoutedRows.of(row_index_R.int(), home_R, offsets, planned, format, fitting)
        x, x_scales, x_row_scales = _operand(x_UD, self.w13, rows, rows.row_index_R)
        dtype = torch.bfloat16 if x_UD.dtype == torch.uint8 else x_UD.dtype
        hidden_RF = grouped_gemm.w13(
            x,
            rows,
            self.w13,
            self.activation,
            self.device,
            bias_eF=self.bias13_eF,
            x_scales=x_scales,
            x_row_scales=x_row_scales,
            out_dtype=dtype,
            reserved_sms=self.reserved_sms,
        )
        hidden, hidden_scales, hidden_row_scales = _operand(hidden_RF, self.w2, rows, None)
        out_RD = x_UD.new_empty(len(row_index_R), self.w2.shape[1], dtype=dtype)
        return grouped_gemm.w2(
            hidden,
            rows,
            self.w2,
            out_RD,
            self.device,
            bias_eD=self.bias2_eD,
            x_scales=hidden_scales,
            x_row_scales=hidden_row_scales,
            reserved_sms=self.reserved_sms,
        )


def _operand(
    x: Tensor, weights: ExpertWeights, rows: grouped_gemm_tiles.RoutedRows, row_index_R: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return rows, their groups' scales and their own, as a product with these weights takes them.

    Without an index, x has the routed rows. With one, x may be all that other ranks can send, of which few rows
    have come: then only those are quantised, each once for every expert that it has here.
    """
    format, few = weights.format, row_index_R is not None and len(row_index_R) < len(x)
    num_rows = rows.expert_offsets[-1:] if row_index_R is None or few else None
    index = row_index_R if few else None
    assert x.dtype != torch.uint8 or format == "fp8_block", f"packed rows meet weights of format {format}"
    if format == "fp8_block":
        if row_index_R is None:
            return *grouped_gemm_tiles.quantize_tiles(x, rows.expert_offsets, rows.tile_map), None
        packed = x.dtype == torch.uint8
        values, scales = (
            unpack(x, weights.shape[2])
            if packed
            else quantize.quantize(x, formats.BLOCK, num_rows=num_rows, index=index)
        )
        return values, grouped_gemm_tiles.tile_scales(scales, row_index_R, rows.expert_offsets, rows.tile_map), None
    if format == "fp8_row":
        values, scales = quantize.quantize(x, x.shape[1], num_rows=num_rows, index=index)
        return values, scales[:, 0], None
    if format in formats.SCALED:
        return block_scaled_mma.quantize_rows(format, x, num_rows, index)
    return x, None, None


def prepare(
    weights: GroupedMlpWeights,
    *,
    device: Device,
    expected: float = 1.0,
    overlapped: bool = False,
    scale_rows: bool = False,
) -> GroupedMlp:
    """As `kernels.ops.experts.PrepareExperts`.

    Tiles are chosen for the share `expected` of R. `overlapped`: rows of another micro-batch are
    exchanged meanwhile, by kernels that need some multiprocessors. `scale_rows`: rows that meet
    4-bit weights are quantised too, which changes results by that rounding.

    Raises:
        ValueError: gate and up of an "nvfp4" expert have different global scales, or rows cannot be quantised for its width.
    """
    w13, w2 = weights.w13, weights.w2
    kinds = [weight.format if isinstance(weight, QuantizedWeight) else "dense" for weight in (w13, w2)]
    assert kinds[0] == kinds[1], f"w13 in {kinds[0]}, w2 in {kinds[1]}"
    pack = block_scaled_mma.pack_weight if scale_rows and kinds[0] in block_scaled_mma.FORMATS else formats.pack4
    columns = {weight.shape[-1] % block_scaled_mma.NVFP4_COLUMNS for weight in (w13, w2)}
    if pack is block_scaled_mma.pack_weight and kinds[0] == "nvfp4" and columns != {0}:
        sizes = w13.shape[-1], w2.shape[-1]
        raise ValueError(
            f"numerics 'fast' needs, on this GPU, nvfp4 experts of widths that {block_scaled_mma.NVFP4_COLUMNS} divides, "
            f"got {sizes}; 'invariant' takes any"
        )
    return GpuExperts(
        w13=formats.of_weight(w13, gated=weights.activation.gated, pack=pack),
        w2=formats.of_weight(w2, pack=pack),
        activation=weights.activation,
        bias13_eF=weights.bias13_eF,
        bias2_eD=weights.bias2_eD,
        device=device,
        expected=expected,
        reserved_sms=device.exchange_sms if overlapped else 0,
    )
