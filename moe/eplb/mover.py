"""A rank's part in moving experts: copies to and from other ranks, each with a checksum, and the switch.

e local experts, S slots (physical experts), M moves, E logical experts, P ranks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from expertwire.comm.group import Group, exchange_now
from expertwire.moe.eplb.migration import Leg
from expertwire.moe.eplb.placement import Placement
from expertwire.moe.layer import MoeLayer

_CHECKSUM_BYTES = 8
_WORDS = 1 << 18  # of a checksum, at a time


class Mover:
    """Carries out legs. All ranks of the group do, together and in the same order.

    Args:
        layers: those with experts; their `experts.weights` are written in place.
        placement: when they were loaded.
        group: the ranks.
    """

    def __init__(self, layers: Mapping[int, MoeLayer], placement: Placement, group: Group) -> None:
        self._layers, self._placement, self._group = layers, placement, group
        self._arrived: dict[int, Tensor] = {}  # by slot, the bytes of an expert that is not in use yet

    @torch.inference_mode()
    def run(self, leg: Leg) -> int:
        """Send and receive; if the layer's copies are complete, use them. How long it took, in µs.

        It waits for a GPU, as copies are looked at before they are used.

        Raises:
            RuntimeError: a copy is damaged.
        """
        weights = self._layers[leg.layer].experts.weights
        _settle(weights[0])
        started = time.perf_counter()
        if len(leg.target_M):
            self._exchange(leg, weights)
        if len(leg.logical_S):
            self._switch(leg, weights)
        _settle(weights[0])
        return int((time.perf_counter() - started) * 1e6)

    def _exchange(self, leg: Leg, weights: tuple[Tensor, ...]) -> None:
        rank_S, me, size = self._placement.rank_of_S, self._group.rank, self._group.size
        from_M, to_M = rank_S[leg.source_M], rank_S[leg.target_M]
        sent, received = np.flatnonzero(from_M == me), np.flatnonzero(to_M == me)
        sent, received = (
            sent[np.argsort(to_M[sent], kind="stable")],
            received[np.argsort(from_M[received], kind="stable")],
        )
        first = self._placement.rank_offsets[me]
        num_bytes = -(-sum(weight[0].nbytes for weight in weights) // 8) * 8 + _CHECKSUM_BYTES
        rows = torch.zeros(len(sent), num_bytes, dtype=torch.uint8, device=weights[0].device)
        for row, slot in zip(rows, leg.source_M[sent] - first, strict=True):
            _pack(row, [weight[slot] for weight in weights])
            row[-_CHECKSUM_BYTES:].view(torch.int64)[0] = _checksum(row)
        counts = [np.bincount(ids, minlength=size).tolist() for ids in (from_M[received], to_M[sent])]
        for move, row in zip(received, exchange_now(self._group, rows, *counts), strict=True):
            self._arrived[int(leg.target_M[move])] = row
            self._check(row, leg.layer, f"rank {from_M[move]}, slot {leg.source_M[move]}")

    def _switch(self, leg: Leg, weights: tuple[Tensor, ...]) -> None:
        first = self._placement.rank_offsets[self._group.rank]
        for slot, row in self._arrived.items():
            into = [weight[slot - first] for weight in weights]
            _unpack(row, into)
            _pack(row, into)
            self._check(row, leg.layer, f"its place in slot {slot}")
        self._arrived.clear()
        layer = Placement(
            num_logical=self._placement.num_logical,
            physical_to_logical=leg.logical_S,
            rank_offsets=self._placement.rank_offsets,
            domains=self._placement.domains,
            shares=leg.turns_S,
        )
        physical_CE = self._layers[leg.layer].physical_CE
        assert physical_CE is not None, f"layer {leg.layer} takes logical experts as they are"
        physical_CE.copy_(torch.from_numpy(layer.physical_for(self._group.rank)))

    @staticmethod
    def _check(row: Tensor, layer: int, where: str) -> None:
        told, found = int(row[-_CHECKSUM_BYTES:].view(torch.int64)), _checksum(row)
        if told != found:
            raise RuntimeError(
                f"an expert of layer {layer} from {where} is damaged: checksum {found:#x}, not {told:#x}"
            )


def _checksum(row: Tensor) -> int:
    """Of what is before it, found where that lies: words of 64 bits times odd numbers, so that no change of a word is lost."""
    words = row[:-_CHECKSUM_BYTES].view(torch.int64)
    odd = torch.arange(1, 2 * min(len(words), _WORDS), 2, device=row.device)
    total = words.new_zeros(())
    for some in words.split(_WORDS):
        total = 3 * total + (some * odd[: len(some)]).sum()
    return int(total)


def _settle(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _pack(row: Tensor, parts: list[Tensor]) -> None:
    """The parts' bytes, one after another."""
    start = 0
    for part in parts:
        row[start : start + part.nbytes] = part.reshape(-1).view(torch.uint8)
        start += part.nbytes


def _unpack(row: Tensor, parts: list[Tensor]) -> None:
    start = 0
    for part in parts:
        part.copy_(row[start : start + part.nbytes].view(part.dtype).view(part.shape))
        start += part.nbytes
