"""A rank's part in moving experts: exchange weights with other ranks, verify checksums, switch to the new placement.

M moved experts, X physical experts, E logical experts, Q the period with which tokens rotate through replicas.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from expertwire.comm.group import Group, exchange_now
from expertwire.moe.eplb.placement import Placement
from expertwire.moe.layer import MoeLayer
from expertwire.scheduler.plan import ExpertMoves

_CHECKSUM_BYTES = 8
_CHECKSUM_WORDS = 1 << 18  # words of 64 bits summed at a time


class ExpertMover:
    """Carries out `ExpertMoves`; all ranks of the group do so together, in the same order.

    Args:
        layers: the MoE layers by number; their `experts.weights` are written in place.
        placement: the one they were loaded with.
        group: the ranks.
    """

    def __init__(self, layers: Mapping[int, MoeLayer], placement: Placement, group: Group) -> None:
        self._layers, self._placement, self._group = layers, placement, group
        self._arrived: dict[int, Tensor] = {}  # by physical expert: bytes not in use yet

    @torch.inference_mode()
    def move(self, moves: ExpertMoves) -> int:
        """Send and receive experts, and use them once a layer's are complete; return the time it took, in µs.

        The host waits for a GPU, as checksums are verified before weights are used.

        Raises:
            RuntimeError: a checksum differs.
        """
        weights = self._layers[moves.layer].experts.weights
        _synchronize(weights[0])
        started = time.perf_counter()
        if len(moves.target_M):
            self._exchange(moves, weights)
        if len(moves.logical_X):
            self._switch(moves, weights)
        _synchronize(weights[0])
        return int((time.perf_counter() - started) * 1e6)

    def _exchange(self, moves: ExpertMoves, weights: tuple[Tensor, ...]) -> None:
        rank_X, me, size = self._placement.rank_of_X, self._group.rank, self._group.size
        from_M, to_M = rank_X[moves.source_M], rank_X[moves.target_M]
        sent, received = np.flatnonzero(from_M == me), np.flatnonzero(to_M == me)
        sent, received = (
            sent[np.argsort(to_M[sent], kind="stable")],
            received[np.argsort(from_M[received], kind="stable")],
        )
        first = self._placement.rank_offsets[me]
        num_bytes = -(-sum(weight[0].nbytes for weight in weights) // 8) * 8 + _CHECKSUM_BYTES
        rows = torch.zeros(len(sent), num_bytes, dtype=torch.uint8, device=weights[0].device)
        for row, slot in zip(rows, moves.source_M[sent] - first, strict=True):
            _pack(row, [weight[slot] for weight in weights])
            row[-_CHECKSUM_BYTES:].view(torch.int64)[0] = _checksum(row)
        counts = [np.bincount(ids, minlength=size).tolist() for ids in (from_M[received], to_M[sent])]
        for move, row in zip(received, exchange_now(self._group, rows, *counts), strict=True):
            self._arrived[int(moves.target_M[move])] = row
            self._check(row, moves.layer, f"rank {from_M[move]}, slot {moves.source_M[move]}")

    def _switch(self, moves: ExpertMoves, weights: tuple[Tensor, ...]) -> None:
        first = self._placement.rank_offsets[self._group.rank]
        for slot, row in self._arrived.items():
            into = [weight[slot - first] for weight in weights]
            _unpack(row, into)
            _pack(row, into)
            self._check(row, moves.layer, f"its memory in slot {slot}")
        self._arrived.clear()
        layer = Placement(
            num_logical=self._placement.num_logical,
            phy2log=moves.logical_X,
            rank_offsets=self._placement.rank_offsets,
            domains=self._placement.domains,
            shares=moves.turns_X,
        )
        log2phy_QE = self._layers[moves.layer].log2phy_QE
        assert log2phy_QE is not None, f"layer {moves.layer} takes logical experts as they are"
        log2phy_QE.copy_(torch.from_numpy(layer.log2phy(self._group.rank)))

    @staticmethod
    def _check(row: Tensor, layer: int, where: str) -> None:
        expected, found = int(row[-_CHECKSUM_BYTES:].view(torch.int64)), _checksum(row)
        if expected != found:
            raise RuntimeError(
                f"an expert of layer {layer} from {where} is damaged: checksum {found:#x}, not {expected:#x}"
            )


def _checksum(row: Tensor) -> int:
    """Return the sum of a row's 64-bit words, each times an odd number, so that a changed word always changes it."""
    words = row[:-_CHECKSUM_BYTES].view(torch.int64)
    odd = torch.arange(1, 2 * min(len(words), _CHECKSUM_WORDS), 2, device=row.device)
    total = words.new_zeros(())
    for some in words.split(_CHECKSUM_WORDS):
        total = 3 * total + (some * odd[: len(some)]).sum()
    return int(total)


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _pack(row: Tensor, parts: list[Tensor]) -> None:
    """Write the bytes of all parts, one after another."""
    start = 0
    for part in parts:
        row[start : start + part.nbytes] = part.reshape(-1).view(torch.uint8)
        start += part.nbytes


def _unpack(row: Tensor, parts: list[Tensor]) -> None:
    start = 0
    for part in parts:
        part.copy_(row[start : start + part.nbytes].view(part.dtype).view(part.shape))
        start += part.nbytes
