"""Order of the routed rows: by expert, and within an expert by (token, k).

The order is stable, so that it, and every sum over rows, is the same in every run.

T tokens, K experts a token, e local experts, N = T * K routed rows at most, R routed rows here; their
number stays on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class TileMap:
    """Tiles of at most `token_tile` sorted rows, each of one expert.

    `first_tile` i32 [e + 1]: each expert's first tile, and how many tiles there are; `tile_expert` i32: each tile's
    expert.
    """

    first_tile: Tensor
    tile_expert: Tensor  # of max_tiles(...), those behind the last tile undefined
    token_tile: int

    @property
    def rows(self) -> int:
        """Return the number of rows of all possible tiles, padding included."""
        return len(self.tile_expert) * self.token_tile


def max_tiles(num_rows: int, num_experts: int, token_tile: int) -> int:
    """Return a bound on the number of tiles for any distribution of rows."""
    return min(num_rows, -(-num_rows // token_tile) + num_experts)


def tile_reference(expert_offsets: Tensor, num_rows: int, token_tile: int) -> TileMap:
    """Return the tiles of rows `expert_offsets[e] : expert_offsets[e + 1]` (i32); `num_rows` bounds the last offset."""
    num_experts = len(expert_offsets) - 1
    tiles = -(-expert_offsets.diff() // token_tile)
    first_tile = torch.cat([tiles.new_zeros(1), tiles.cumsum(0, dtype=torch.int32)])
    tile_expert = tiles.new_zeros(max_tiles(num_rows, num_experts, token_tile))
    experts = torch.arange(num_experts, dtype=torch.int32, device=tiles.device).repeat_interleave(tiles)
    tile_expert[: len(experts)] = experts
    return TileMap(first_tile, tile_expert, token_tile)


@dataclass(frozen=True, kw_only=True)
class Permuted:
    """Rows `expert_offsets[e] : expert_offsets[e + 1]` are expert e's; unused places hold -1."""

    expert_offsets: Tensor  # i32 [e + 1]
    row_index_N: Tensor  # i32, the token
    home_N: Tensor  # i32, t * K + k: the row's place in the combine layout
    tile_map: TileMap | None = None  # if requested


class Permute(Protocol):
    """See `reference`."""

    def __call__(
        self, ids_TK: Tensor, num_experts: int, num_valid: Tensor | None = None, *, token_tile: int | None = None
    ) -> Permuted:
        """Return the order."""
        ...


def reference(
    ids_TK: Tensor,
    num_experts: int,
    num_valid: Tensor | None = None,
    *,
    token_tile: int | None = None,
) -> Permuted:
    """Return the order of rows of local experts `ids_TK`, i32 or i64.

    Ids outside of [0, num_experts) are skipped, as are all ids of tokens from `num_valid` (i32 [1]) on. With a
    `token_tile`, the tiles of the rows are found too.
    """
    top_k, ids_N = ids_TK.shape[1], ids_TK.flatten().long()
    here_N = (ids_N >= 0) & (ids_N < num_experts)
    if num_valid is not None:
        here_N &= torch.arange(len(ids_N), device=ids_N.device) < num_valid * top_k
    home_R = torch.where(here_N, ids_N, num_experts).sort(stable=True).indices[: int(here_N.sum())].int()
    home_N = torch.full_like(ids_N, -1, dtype=torch.int32)
    home_N[: len(home_R)] = home_R
    counts = torch.bincount(ids_N[here_N], minlength=num_experts)
    expert_offsets = torch.zeros(num_experts + 1, dtype=torch.int32, device=ids_TK.device)
    expert_offsets[1:] = counts.cumsum(0)
    row_index_N = torch.where(home_N < 0, home_N, home_N // top_k)
    tile_map = tile_reference(expert_offsets, len(ids_N), token_tile) if token_tile else None
    return Permuted(expert_offsets=expert_offsets, row_index_N=row_index_N, home_N=home_N, tile_map=tile_map)
