"""Quantised weights as checkpoints store them: the meaning of their bytes, dequantisation and quantisation.

A weight is `value * scale` in fp32 (one rounding, two where scales have two levels), rounded once to the requested
dtype.

format    | numbers                  | scales                      | source fp8_block | e4m3                     |
fp32, a block of 128 x 128  | DeepSeek-V3 (arXiv 2412.19437, 3.3.2), `weight_scale_inv` fp8_row   | e4m3
| fp32, a row                 | compressed-tensors "channel"; a tensor: Mistral, ModelOpt FP8 int4      | 4 bits
less 8            | bf16, 32 columns            | compressed-tensors "pack-quantized" mxfp4     | e2m1
| e8m0, 32 columns            | OCP Microscaling Formats v1.0, 5.3.3; gpt-oss nvfp4     | e2m1                     |
e4m3, 16 columns; then fp32 | ModelOpt NVFP4, `weight_scale` and `weight_scale_2`

M rows and K columns of a matrix, J groups of columns; leading dimensions are experts, or there are none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

FORMATS = ("fp8_block", "fp8_row", "int4", "mxfp4", "nvfp4")
GROUPS = {"int4": 32, "mxfp4": 32, "nvfp4": 16}  # columns that share a scale
BLOCK = 128  # rows and columns that share a scale in "fp8_block"
FP8 = torch.float8_e4m3fn
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the codes' magnitudes; the fourth bit is the sign
GPU_LINEAR_FORMATS = ("fp8_block", "fp8_row")  # those that `kernels.gpu.linear` multiplies as they are stored
ON_THE_FLY = {"fp8": "fp8_block", "int4": "int4", "mxfp4": "mxfp4"}  # the option `quantization`

_DTYPES = {  # data, scales
    "fp8_block": (FP8, torch.float32),
    "fp8_row": (FP8, torch.float32),
    "int4": (torch.int32, torch.bfloat16),
    "mxfp4": (torch.uint8, torch.uint8),
    "nvfp4": (torch.uint8, FP8),
}
_PER_ELEMENT = {"int4": 8, "mxfp4": 2, "nvfp4": 2}  # numbers in an element of data
_FP8_MAX, _E2M1_MAX = 448.0, 6.0
_LEAST = 1e-12  # smallest scale; zeros stay zeros


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedWeight:
    """Matrices [..., M, K]: `data` and `scales` as in the checkpoint.

    fp8_block: data e4m3 [..., M, K]; scales fp32 [..., sum over parts of ceil(rows / 128), ceil(K / 128)]
    fp8_row: data e4m3 [..., M, K]; scales fp32 [..., M], where a whole tensor has one, repeated
    int4: data i32 [..., M, K / 8], number i at bits 4i, less 8; scales bf16 [..., M, K / 32]
    mxfp4: data u8 [..., M, K / 2], low half first; scales u8 [..., M, K / 32], exponents and 127
    nvfp4: data u8 [..., M, K / 2], low half first; scales e4m3 [..., M, K / 16]; global_scales fp32 [..., len(parts)]

    `parts`: numbers of rows of the stacked matrices (q, k, v; gate, up); each has its own blocks and its own global
    scale.
    """

    format: str
    data: Tensor
    scales: Tensor
    parts: tuple[int, ...]
    global_scales: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.format in FORMATS, (self.format, FORMATS)
        assert (self.data.dtype, self.scales.dtype) == _DTYPES[self.format], (
            self.format,
            self.data.dtype,
            self.scales.dtype,
        )
        *lead, num_rows, num_columns = self.shape
        group = GROUPS.get(self.format, 1)
        assert sum(self.parts) == num_rows and min(self.parts) > 0, (self.format, self.parts, self.shape)  # noqa: PT018
        assert num_columns % group == 0, (self.format, num_columns, group)
        expected = {
            "fp8_block": (*lead, sum(_num_blocks(self.parts)), -(-num_columns // BLOCK)),
            "fp8_row": (*lead, num_rows),
        }.get(self.format, (*lead, num_rows, num_columns // group))
        assert self.scales.shape == expected, (self.format, self.shape, self.parts, self.scales.shape, expected)
        found = None if self.global_scales is None else (tuple(self.global_scales.shape), self.global_scales.dtype)
        wanted = ((*lead, len(self.parts)), torch.float32) if self.format == "nvfp4" else None
        assert found == wanted, (self.format, self.parts, found, wanted)

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., M, K)."""
        *lead, K = self.data.shape
        return (*lead, K * _PER_ELEMENT.get(self.format, 1))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for t in (self.data, self.scales, self.global_scales) if t is not None)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @property
    def device(self) -> torch.device:
        return self.data.device

    def expert(self, e: int) -> QuantizedWeight:
        """Return one of the matrices [e, M, K], as views."""
        return self._of(lambda tensor: tensor[e])

    def experts(self, start: int, end: int) -> QuantizedWeight:
        """Return some of the matrices [e, M, K], as views."""
        return self._of(lambda tensor: tensor[start:end])

    def flat(self) -> QuantizedWeight:
        """Return the matrices with one leading dimension."""
        lead = self.data.dim() - 2
        return self._of(lambda tensor: tensor.reshape(-1, *tensor.shape[lead:]))

    def _of(self, view: Callable[[Tensor], Tensor]) -> QuantizedWeight:
        global_scales = None if self.global_scales is None else view(self.global_scales)
        return replace(self, data=view(self.data), scales=view(self.scales), global_scales=global_scales)


Weight = Tensor | QuantizedWeight


def _num_blocks(parts: tuple[int, ...]) -> list[int]:
    return [-(-rows // BLOCK) for rows in parts]


def block_rows(parts: tuple[int, ...]) -> Tensor:
    """Return i64 [M], the row of blocks of each row of stacked matrices."""
    starts = accumulate(_num_blocks(parts), initial=0)
    return torch.cat([start + torch.arange(rows) // BLOCK for start, rows in zip(starts, parts, strict=False)])


def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Return [..., M, K] in `dtype`: `value * scale` in fp32, rounded once."""
    if isinstance(weight, Tensor):
        return weight.to(dtype)
    found = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    flat = weight.flat()
    for e, matrix in enumerate(found.view(-1, *weight.shape[-2:])):  # one at a time: fp32 needs memory
        matrix.copy_(_dequantize_matrix(flat.expert(e)))
    return found


def _dequantize_matrix(weight: QuantizedWeight) -> Tensor:
    """Return fp32 [M, K]."""
    scales = row_scales(weight)
    values = numbers(weight)
    group = values.shape[1] if weight.format == "fp8_row" else GROUPS.get(weight.format, BLOCK)
    whole = values.shape[1] // group * group
    values[:, :whole].view(len(values), -1, group).mul_(scales[:, : whole // group, None])
    values[:, whole:].mul_(scales[:, whole // group :])
    return values


def numbers(weight: QuantizedWeight) -> Tensor:
    """Return fp32 [..., M, K], the numbers without their scales."""
    stored = weight.data.contiguous().view(torch.uint8)
    values = byte_values(weight.format).to(stored.device)
    return values.index_select(0, stored.flatten().int()).view(torch.float32).view(weight.shape)


def byte_values(format: str) -> Tensor:
    """Return [256], the value of each byte of data: fp32, or two fp32 seen as one i64, for one look-up of both."""
    stored = torch.arange(256)
    if _DTYPES[format][0] == FP8:
        return stored.to(torch.uint8).view(FP8).float()
    halves = stored[:, None] >> torch.tensor([0, 4]) & 15  # low half first
    magnitudes = torch.tensor(E2M1)
    values = halves.float() - 8 if format == "int4" else torch.cat((magnitudes, -magnitudes))[halves]
    return values.view(torch.int64)[:, 0].contiguous()


def row_scales(weight: QuantizedWeight) -> Tensor:
    """Return fp32 [..., M, J], the factor of each group of a row; J is 1 for "fp8_row"."""
    scales = weight.scales
    if weight.format == "fp8_row":
        return scales[..., None]
    if weight.format == "fp8_block":
        blocks = scales.split(_num_blocks(weight.parts), dim=-2)
        parts = zip(blocks, weight.parts, strict=True)
        return torch.cat([part.repeat_interleave(BLOCK, dim=-2)[..., :rows, :] for part, rows in parts], dim=-2)
    if weight.format == "mxfp4":
        return exponents_to_fp32(scales)
    if weight.global_scales is None:
        return scales.float()
    rows = torch.tensor(weight.parts, device=scales.device)
    return scales.float() * weight.global_scales.repeat_interleave(rows, dim=-1)[..., None]


def exponents_to_fp32(exponents: Tensor) -> Tensor:
    """Return `2 ** (x - 127)` for e8m0 exponents, u8; 255 is NaN (OCP Microscaling Formats v1.0, 5.4.1)."""
    return exponents.view(torch.float8_e8m0fnu).float()


def quantize_experts(w_eMK: Tensor, name: str, parts: tuple[int, ...] | None = None) -> QuantizedWeight:
    """Return unquantised experts in the format that the option `quantization` names.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in ON_THE_FLY:
        raise ValueError(f"quantize is {name!r}, must be one of {tuple(ON_THE_FLY)}")
    return quantize(ON_THE_FLY[name], w_eMK, parts)


def quantize(format: str, w: Tensor, parts: tuple[int, ...] | None = None) -> QuantizedWeight:
    """Quantise [..., M, K] in fp32, bf16 or fp16, rounding to nearest; `parts` as in `QuantizedWeight`, else one.

    fp8: scale `max / 448`. int4: `max / 7.5`, as compressed-tensors. mxfp4: `2 ** (floor(log2(max)) - 2)`, larger
    numbers clamped (OCP Microscaling Formats v1.0, 6.3). nvfp4: the global scale `max / (6 * 448)`, then `max / 6`
    of a group.
    """
    assert format in FORMATS, (format, FORMATS)
    parts = parts or (w.shape[-2],)
    assert sum(parts) == w.shape[-2], (parts, w.shape)
    make = {"fp8_block": _to_blocks, "fp8_row": _to_rows, "int4": _to_int4, "mxfp4": _to_mxfp4, "nvfp4": _to_nvfp4}
    found = [make[format](matrix.float(), parts) for matrix in w.reshape(-1, *w.shape[-2:])]
    data, scales, *rest = (
        torch.stack(tensors).unflatten(0, w.shape[:-2] or (1,)) for tensors in zip(*found, strict=True)
    )
    if w.dim() == 2:
        data, scales, rest = data[0], scales[0], [tensor[0] for tensor in rest]
    return QuantizedWeight(
        format=format, data=data, scales=scales, parts=parts, global_scales=rest[0] if rest else None
    )


def _to_blocks(w_MK: Tensor, parts: tuple[int, ...]) -> tuple[Tensor, ...]:
    found = []
    for part in w_MK.split(parts):
        rows, columns = part.shape
        padded = F.pad(part, (0, -columns % BLOCK, 0, -rows % BLOCK))
        blocks = padded.view(-(-rows // BLOCK), BLOCK, -(-columns // BLOCK), BLOCK)
        scales = (blocks.abs().amax((1, 3)) / _FP8_MAX).clamp(min=_LEAST)
        found.append(((blocks / scales[:, None, :, None]).view(padded.shape)[:rows, :columns].to(FP8), scales))
    return tuple(torch.cat(tensors) for tensors in zip(*found, strict=True))


def _to_rows(w_MK: Tensor, parts: tuple[int, ...]) -> tuple[Tensor, ...]:
    scales = (w_MK.abs().amax(1) / _FP8_MAX).clamp(min=_LEAST)
    return (w_MK / scales[:, None]).to(FP8), scales


def _to_int4(w_MK: Tensor, parts: tuple[int, ...]) -> tuple[Tensor, ...]:
    groups = w_MK.unflatten(1, (-1, GROUPS["int4"]))
    scales = (groups.abs().amax(-1) / 7.5).clamp(min=_LEAST).bfloat16()
    codes = (groups / scales.float()[..., None]).round().clamp(-8, 7) + 8
    return _bytes(codes.to(torch.uint8).flatten(1)).view(torch.int32), scales


def _to_mxfp4(w_MK: Tensor, parts: tuple[int, ...]) -> tuple[Tensor, ...]:
    groups = w_MK.unflatten(1, (-1, GROUPS["mxfp4"]))
    _, exponents = torch.frexp(groups.abs().amax(-1))  # mantissas are in [0.5, 1)
    scales = (exponents - 1 - 2 + 127).clamp(0, 254).to(torch.uint8)
    return _bytes(_e2m1(groups / exponents_to_fp32(scales)[..., None]).flatten(1)), scales


def _to_nvfp4(w_MK: Tensor, parts: tuple[int, ...]) -> tuple[Tensor, ...]:
    groups = w_MK.unflatten(1, (-1, GROUPS["nvfp4"]))
    largest = groups.abs().amax(-1)
    global_scales = torch.stack([part.amax() for part in largest.split(parts)]) / (_E2M1_MAX * _FP8_MAX)
    global_scales = global_scales.clamp(min=_LEAST)
    row_scale = global_scales.repeat_interleave(torch.tensor(parts, device=w_MK.device))[:, None]
    scales = (largest / _E2M1_MAX / row_scale).to(FP8)
    values = groups / (scales.float() * row_scale)[..., None]
    return _bytes(_e2m1(values).flatten(1)), scales, global_scales  # without a scale every code is 0


def _e2m1(values: Tensor) -> Tensor:
    """Return u8, the nearest codes, ties to even."""
    middles = torch.tensor([(low + high) / 2 for low, high in pairwise(E2M1)])
    middles[1::2] = middles[1::2].nextafter(torch.tensor(0.0))
    codes = torch.bucketize(values.abs(), middles.to(values.device))
    return (codes + 8 * (values < 0)).to(torch.uint8)


def _bytes(codes_MK: Tensor) -> Tensor:
    """Return bytes of two codes each, the first in the low half."""
    return codes_MK[:, 0::2] | codes_MK[:, 1::2] << 4
