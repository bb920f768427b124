"""A mixture-of-experts layer over the ranks of a group: route, dispatch, experts, combine.

T tokens of this rank, K experts a token, D model width, E logical experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expertwire.comm.all_to_all import AllToAll
from expertwire.kernels.experts import GroupedMlp
from expertwire.kernels.registry import Ops
from expertwire.kernels.routing import Router


@dataclass(frozen=True, kw_only=True)
class MoeLayer:
    """The weights of one layer on one rank and the way to the others.

    `load_E` i64 counts, on the host, how many rows this rank's tokens have sent to each logical expert.
    """

    ops: Ops
    router: Router
    experts: GroupedMlp
    shared: Callable[[Tensor], Tensor] | None
    all_to_all: AllToAll
    physical_of_E: Tensor  # i64, for this home rank
    load_E: np.ndarray

    def forward(self, x_TD: Tensor, num_tokens_P: Sequence[int]) -> Tensor:
        """x [T, D] -> y [T, D]; every rank of the group calls it together, also with no tokens."""
        ids_TK, weights_TK = self.router(x_TD)
        self.load_E[:] += np.bincount(ids_TK.flatten().cpu().numpy(), minlength=len(self.load_E))
        handle = self.all_to_all.dispatch_send(x_TD, self.physical_of_E.take(ids_TK), num_tokens_P)
        shared_TD = self.shared(x_TD) if self.shared is not None else None
        arrived = self.all_to_all.dispatch_recv(handle)
        y_RD = self.experts(arrived.x_UD, arrived.row_index_R, arrived.expert_offsets)
        returning = self.all_to_all.combine_send(handle, y_RD)
        y_TD = self.ops.combine(self.all_to_all.combine_recv(returning), weights_TK)
        return y_TD if shared_TD is None else torch.add(y_TD, shared_TD)
