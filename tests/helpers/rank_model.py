"""`bench.serving.rank_model` that notices near ties, at which another implementation may choose differently.

T tokens, E experts, K chosen, H index heads, d their size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from expertwire.bench.serving.rank_model import RankModel as _RankModel
from expertwire.comm.group import Group
from expertwire.kernels.ops.routing import Route
from expertwire.kernels.ops.variants import Routing
from expertwire.kernels.registry import Ops

INDEX_MARGIN = 1e-5  # of index weights, relative: several times what rounding makes of scores


class RankModel(_RankModel):
    """A model whose routers can be watched."""

    def watch_routers(self, margin: float) -> Callable[[], bool]:
        """Watch for near ties: router logits that choose other experts with noise of `margin`, or index weights that choose
        other positions with noise of rounding. Return a function that says whether there was one, and resets that."""
        near = [False]
        for i, layer in enumerate(self.model.layers):
            if layer.moe is not None:
                watched = replace(layer.moe.router, route=_watched_route(layer.moe.router.route, margin, near))
                moe = replace(layer.moe, router=watched, block=None)
                self.model.layers[i] = layer = replace(layer, moe=moe)
            attention = None if layer.mixer is None else layer.mixer.__self__
            if getattr(attention, "index", None) is not None:
                ops = attention.context.ops
                watched = replace(attention.context, ops=replace(ops, choose_positions=_watched_choice(ops, near)))
                attention = replace(attention, index=replace(attention.index, context=watched))
                self.model.layers[i] = replace(layer, mixer=attention.forward)

        def tell() -> bool:
            found, near[0] = near[0], False
            return found

        return tell


def logits_of_rank(group: Group, folder: Path, prompts_P: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the logits of a rank's prompt; called in processes of `helpers.ranks`, which need not import transformers."""
    torch.set_num_threads(1)
    return RankModel(folder, group=group).logits(prompts_P[group.rank], 50)


def _watched_choice(ops: Ops, near: list[bool]) -> Callable[..., torch.Tensor]:
    """Return its choice of positions, which sets `near[0]` if noise of `INDEX_MARGIN` changes it."""
    generator = torch.Generator().manual_seed(0)

    def choose(q_THd: torch.Tensor, weights_TH: torch.Tensor, *more: Any) -> torch.Tensor:
        chosen_Tk = ops.choose_positions(q_THd, weights_TH, *more)
        for _ in range(3):
            noise_TH = (torch.rand(weights_TH.shape, generator=generator) - 0.5) * 2 * INDEX_MARGIN
            others_Tk = ops.choose_positions(q_THd, weights_TH * (1 + noise_TH), *more)
            near[0] |= not torch.equal(others_Tk.sort(-1).values, chosen_Tk.sort(-1).values)
        return chosen_Tk

    return choose


def _watched_route(route: Route, margin: float, near: list[bool]) -> Route:
    """Return `route`, which then sets `near[0]` if noise of `margin` changes its choice."""
    generator = torch.Generator().manual_seed(0)

    def watched(
        logits_TE: torch.Tensor, routing: Routing, bias_E: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids_TK, weights_TK = route(logits_TE, routing, bias_E)
        for _ in range(3):
            noise_TE = (torch.rand(logits_TE.shape, generator=generator) - 0.5) * 2 * margin
            others_TK = route(logits_TE + noise_TE, routing, bias_E)[0]
            near[0] |= not torch.equal(others_TK.sort(-1).values, ids_TK.sort(-1).values)
        return ids_TK, weights_TK

    return watched
