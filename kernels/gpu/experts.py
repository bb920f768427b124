"""The experts' MLP on a GPU, as `kernels.experts.GroupedMlp`: two grouped GEMMs, and nothing known on the host.

R routed rows, D model width, F expert width, e local experts.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from expertwire.kernels.experts import Activation, GroupedMlp
from expertwire.kernels.gpu import formats, grouped_gemm, tiles
from expertwire.kernels.gpu.compile import Case
from expertwire.kernels.gpu.device import Device
from expertwire.kernels.permute import TileMap


def prepare(w13_eFD: Tensor, w2_eDF: Tensor, *, device: Device) -> GroupedMlp:
    """A callable for these weights, [e, 2F, D] and [e, D, F]. Given offsets on the host, it copies them."""
    w13, w2 = formats.dense(w13_eFD, gated=True), formats.dense(w2_eDF)
    activation = Activation()

    def apply(
        x_UD: Tensor,
        row_index_R: Tensor,
        offsets: Tensor | np.ndarray,
        home_R: Tensor | None = None,
        tile_map: TileMap | None = None,
    ) -> Tensor:
        if isinstance(offsets, np.ndarray):
            offsets = torch.from_numpy(offsets.astype(np.int32)).to(x_UD.device)
        if home_R is None:
            home_R = torch.arange(len(row_index_R), dtype=torch.int32, device=x_UD.device)
        rows = tiles.Rows.of(row_index_R.int(), home_R, offsets, len(row_index_R), "dense", tile_map)
        hidden_RF = grouped_gemm.w13(x_UD, rows, w13, activation, device)
        return grouped_gemm.w2(hidden_RF, rows, w2, x_UD.new_empty(len(row_index_R), x_UD.shape[1]), device)

    return apply


def cases() -> list[Case]:
    """None of its own: the kernels are `grouped_gemm`'s."""
    return []
