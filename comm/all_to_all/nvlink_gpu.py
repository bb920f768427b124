"""Dispatch and combine by writing into the peers' memory, on GPUs: the protocol of `comm.all_to_all.nvlink` as kernels.

Epochs and counts are on the device and the host waits for nothing, so that a CUDA graph can capture all phases. A wait that
times out ends, and later results are invalid, which `check` raises. Kernels that wait for other ranks are not launched
early: they would occupy multiprocessors that another stream's kernels need.

Built for packed rows (`comm.all_to_all.fp8.packed`), it also takes unquantised rows, and quantises them as it stores them.

Letters as in `comm.all_to_all.base`; R is an upper bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import triton
from torch import Tensor

from expertwire.comm import symmetric_memory
from expertwire.comm.all_to_all.base import AllToAllSpec, Dispatched, Handle
from expertwire.comm.all_to_all.symmetric_buffer import (
    COMBINE,
    DISPATCH,
    SIGNAL_WORDS,
    BufferLayout,
    Region,
    stall_error,
)
from expertwire.comm.group import TorchGroup
from expertwire.kernels.gpu import dispatch_combine, dispatch_low_latency, signals
from expertwire.kernels.gpu.dependent_launch import PDL
from expertwire.kernels.ops.quantize import packed_bytes

_STORE = 16  # bytes
OVERLAP_PROGRAMS = 48  # that move rows while experts compute: three on each multiprocessor that these leave free


@dataclass(frozen=True, kw_only=True)
class _Handle(Handle):
    num_tokens: int
    most_tokens: int  # of a rank
    max_rows: int  # R


def build(spec: AllToAllSpec) -> tuple[NvlinkGpuAllToAll, ...]:
    """Return an all-to-all for each micro-batch, all in one allocation of symmetric memory, valid until the group is closed.

    All ranks call it together.

    Raises:
        ValueError: the GPUs do not reach each other's memory, or rows are no multiple of 16 bytes.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    nbytes = BufferLayout.of(spec).nbytes
    memories = symmetric_memory.symmetric(cast(TorchGroup, spec.group), spec.num_micro_batches * nbytes, device)
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    return tuple(
        NvlinkGpuAllToAll(
            replace(spec, micro_batch=index),
            [memory[index * nbytes : (index + 1) * nbytes] for memory in memories],
            num_programs=num_sms,
        )
        for index in range(spec.num_micro_batches)
    )


class NvlinkGpuAllToAll:
    """An all-to-all of kernels over symmetric memory.

    Args:
        memories: bytes of the ranks' buffers, by rank (`comm.symmetric_memory`).
        num_programs: programs that move rows.
        few_ids: a rank sends up to so many expert ids in one launch. Rows and counts are stored alike either way, so
            ranks may differ.
        few_arrived_ids: up to so many ids of all ranks, as bounded by the plan, are sorted in one launch.
        max_turns: polls of a wait in the interpreter, which has no clock.
    """

    graph_safe = True

    def __init__(
        self,
        spec: AllToAllSpec,
        memories: Sequence[Tensor],
        *,
        num_programs: int,
        few_ids: int = dispatch_low_latency.MAX_IDS,
        few_arrived_ids: int = dispatch_low_latency.MAX_ARRIVED_IDS,
        max_turns: int = 1,
    ) -> None:
        layout = BufferLayout.of(spec)
        mine = memories[spec.group.rank]
        self._spec, self._layout, self._mine, self._num_programs = spec, layout, mine, num_programs
        self._few_ids, self._few_arrived_ids = few_ids, few_arrived_ids
        if spec.num_micro_batches > 1:
            # The other micro-batch computes meanwhile, on all but a few multiprocessors. One warp waits, not a program an expert.
            self._num_programs, self._few_arrived_ids = min(num_programs, OVERLAP_PROGRAMS), 0
        # A kernel that is compiled ahead, for tensors on "meta", has to be the one that a GPU launches.
        self._has_clock = mine.device.type != "cpu"
        self._limit = int(spec.timeout_s * 1e9) if self._has_clock else max_turns
        combine_dtype, combine_size = spec.combine_dtype or spec.dtype, spec.combine_size or spec.hidden_size
        for what, nbytes in (
            ("dispatch", spec.hidden_size * spec.dtype.itemsize),
            ("combine", combine_size * combine_dtype.itemsize),
        ):
            if nbytes % _STORE:
                raise ValueError(
                    f"all2all_backend 'nvlink' moves rows of a multiple of {_STORE} bytes on GPUs, "
                    f"those of a {what} have {nbytes}"
                )
        num_ranks, tokens, top_k = spec.group.size, spec.max_tokens, spec.top_k
        first, last = spec.rank_offsets[spec.group.rank : spec.group.rank + 2]
        self._num_experts = last - first
        most_rows = self._most_rows([tokens] * num_ranks)
        device = mine.device
        self._check_stream = torch.cuda.Stream(device) if mine.is_cuda else None

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self._memories = tuple(memories)  # kept alive: the kernels have their addresses
        self._peers = torch.tensor([memory.data_ptr() for memory in memories], dtype=torch.int64, device=device)
        self._rank_offsets = torch.tensor(spec.rank_offsets, dtype=torch.int32, device=device)
        self._epoch, self._done = zeros(1, dtype=torch.int64) + 1, zeros(1)
        self._target, self._sent = zeros(tokens, top_k), zeros(num_ranks, dtype=torch.int64)
        self._counts, self._expert_offsets = zeros(num_ranks, self._num_experts), zeros(self._num_experts + 1)
        self._row_index, self._slots = zeros(most_rows), zeros(most_rows)
        self._in_order = torch.arange(most_rows, dtype=torch.int32, device=device)
        self._rows = self._region(layout.dispatch_rows).view(num_ranks * tokens, -1).view(spec.dtype)
        self._y_TKD = self._region(layout.combine_rows).view(tokens, top_k, -1).view(combine_dtype)
        self._words, self._home_words = (
            self._rows.stride(0) * spec.dtype.itemsize // 4,
            layout.combine_rows.shape[-1] // 4,
        )

    def dispatch_send(
        self, x_TD: Tensor, physical_TK: Tensor, num_tokens_P: Sequence[int], num_valid: Tensor | None = None
    ) -> _Handle:
        spec, num_tokens, top_k = self._spec, x_TD.shape[0], self._spec.top_k
        if x_TD.dtype != spec.dtype:
            assert packed_bytes(x_TD.shape[1]) == spec.hidden_size, (
                f"{tuple(x_TD.shape)} for rows of {spec.hidden_size} bytes"
            )
        assert num_tokens == num_tokens_P[spec.group.rank], f"{num_tokens} tokens, plan {num_tokens_P}"
        assert max(num_tokens_P) <= spec.max_tokens, f"{num_tokens_P} tokens, built for {spec.max_tokens}"
        assert x_TD.is_contiguous(), x_TD.stride()
        assert physical_TK.is_contiguous(), physical_TK.stride()
        send = self._send_few if num_tokens * top_k <= self._few_ids else self._send
        send(x_TD, physical_TK, num_tokens, num_valid)
        most_tokens = max(num_tokens_P)
        return _Handle(num_tokens=num_tokens, most_tokens=most_tokens, max_rows=self._most_rows(num_tokens_P))

    def dispatch_recv(self, handle: Handle) -> Dispatched:
        assert isinstance(handle, _Handle), handle
        if handle.most_tokens * self._spec.group.size * self._spec.top_k <= self._few_arrived_ids:
            self._arrive_few(handle.most_tokens)
        else:
            self._arrive()
        return Dispatched(
            x_UD=self._rows,
            row_index_R=self._row_index[: handle.max_rows],
            expert_offsets=self._expert_offsets,
            home_R=self._in_order[: handle.max_rows],
        )

    def combine_send(self, handle: Handle, y_RD: Tensor) -> _Handle:
        assert isinstance(handle, _Handle), handle
        spec, layout = self._spec, self._layout
        assert y_RD.is_contiguous(), y_RD.stride()
        block, warps = dispatch_combine.row_block(self._home_words)
        dispatch_combine.combine_send_kernel[(self._num_programs,)](
            _as_words(y_RD), self._slots, self._expert_offsets, self._epoch, self._done, self._peers,
            spec.group.rank, spec.group.size, self._num_experts, spec.max_tokens * spec.top_k,
            layout.combine_signals.offset, layout.combine_rows.offset,
            WORDS=self._home_words, BLOCK=block, RANKS=triton.next_power_of_2(spec.group.size), num_warps=warps, **PDL,
        )  # fmt: skip
        return handle

    def combine_recv(self, handle: Handle) -> Tensor:
        assert isinstance(handle, _Handle), handle
        self._wait(self._layout.combine_signals.offset, COMBINE)
        return self._y_TKD[: handle.num_tokens]

    def check(self) -> None:
        """See `comm.all_to_all.base.Checkable`."""
        with torch.cuda.stream(self._check_stream):  # a stream of its own, not behind work launched since
            stalled = self._region(self._layout.stall_signals).cpu()
        words = stalled.view(torch.int64).view(-1, SIGNAL_WORDS)[:, 0].numpy()
        if words.any():
            raise stall_error(words, self._spec)

    def _send(self, x_TD: Tensor, physical_TK: Tensor, num_tokens: int, num_valid: Tensor | None) -> None:
        spec, layout, top_k = self._spec, self._layout, self._spec.top_k
        me, num_ranks = spec.group.rank, spec.group.size
        valid, limited = self._limit_of(num_valid)
        dispatch_combine.dispatch_plan_kernel[(num_ranks,)](
            physical_TK, self._rank_offsets, self._target, self._sent, valid, num_tokens, spec.max_tokens,
            K=top_k, K_BLOCK=triton.next_power_of_2(top_k), TOKENS=dispatch_combine.plan_tokens(num_tokens, top_k),
            LIMITED=limited,
            **PDL,
        )  # fmt: skip
        x, columns = self._as_kernel_rows(x_TD)
        words = max(self._words, self._home_words)
        block, warps = dispatch_combine.quantized_block(columns) if columns else dispatch_combine.row_block(words)
        dispatch_combine.dispatch_send_kernel[(max(1, min(self._num_programs, num_tokens)),)](
            x, physical_TK, self._target, self._sent, valid, self._epoch, self._done, self._peers,
            me, num_tokens, spec.max_tokens, num_ranks,
            layout.dispatch_signals.offset, layout.routes.offset, layout.dispatch_rows.offset, layout.combine_rows.offset,
            K=top_k, K_BLOCK=triton.next_power_of_2(top_k + 1), WORDS=self._words, COLUMNS=columns,
            COMBINE_WORDS=self._home_words, BLOCK=block, RANKS=triton.next_power_of_2(num_ranks), LIMITED=limited,
            num_warps=warps, **dispatch_combine.SEND_OPTIONS,
        )  # fmt: skip

    def _send_few(self, x_TD: Tensor, physical_TK: Tensor, num_tokens: int, num_valid: Tensor | None) -> None:
        spec, layout, top_k = self._spec, self._layout, self._spec.top_k
        valid, limited = self._limit_of(num_valid)
        x, columns = self._as_kernel_rows(x_TD)
        block, warps = dispatch_low_latency.row_block(columns or max(self._words, self._home_words))
        dispatch_low_latency.low_latency_send_kernel[(max(num_tokens, spec.group.size),)](
            x, physical_TK, self._rank_offsets, valid, self._epoch, self._done, self._peers,
            spec.group.rank, num_tokens, spec.max_tokens, spec.group.size,
            layout.dispatch_signals.offset, layout.routes.offset, layout.dispatch_rows.offset, layout.combine_rows.offset,
            K=top_k, K_BLOCK=triton.next_power_of_2(top_k), TOKENS=triton.next_power_of_2(max(1, num_tokens)),
            WORDS=self._words, COLUMNS=columns, COMBINE_WORDS=self._home_words, BLOCK=block,
            RANKS=triton.next_power_of_2(spec.group.size), LIMITED=limited, num_warps=warps,
            **dispatch_combine.SEND_OPTIONS,
        )  # fmt: skip

    def _limit_of(self, num_valid: Tensor | None) -> tuple[Tensor, bool]:
        """Return the pointer to the number of valid tokens, and whether there is one: an unused pointer may be any."""
        return (self._expert_offsets, False) if num_valid is None else (num_valid, True)

    def _as_kernel_rows(self, x_TD: Tensor) -> tuple[Tensor, int]:
        """Return rows as words and 0; or, to be quantised, as numbers and the number of columns."""
        return (_as_words(x_TD), 0) if x_TD.dtype == self._spec.dtype else (x_TD, x_TD.shape[1])

    def _arrive(self) -> None:
        spec, layout, me, num_ranks = self._spec, self._layout, self._spec.group.rank, self._spec.group.size
        self._wait(layout.dispatch_signals.offset, DISPATCH)
        sizes = {
            "K": spec.top_k,
            "CHUNK": dispatch_combine.ids_chunk(spec.max_tokens * spec.top_k),
            "EXPERTS": triton.next_power_of_2(self._num_experts + 1),
        }
        dispatch_combine.dispatch_count_kernel[(num_ranks,)](
            self._peers, self._rank_offsets, self._counts, me, spec.max_tokens, self._num_experts,
            layout.dispatch_signals.offset, layout.routes.offset, **sizes, **PDL,
        )  # fmt: skip
        dispatch_combine.dispatch_index_kernel[(self._num_experts + 1, num_ranks)](
            self._peers, self._rank_offsets, self._counts, self._expert_offsets, self._row_index, self._slots,
            me, num_ranks, spec.max_tokens, self._num_experts, layout.dispatch_signals.offset, layout.routes.offset,
            **sizes, RANKS=triton.next_power_of_2(num_ranks), **PDL,
        )  # fmt: skip

    def _arrive_few(self, most_tokens: int) -> None:
        spec, layout = self._spec, self._layout
        dispatch_low_latency.low_latency_receive_kernel[(self._num_experts + 1,)](
            self._peers, self._rank_offsets, self._epoch, self._expert_offsets, self._row_index, self._slots,
            spec.group.rank, spec.group.size, spec.max_tokens, self._num_experts,
            layout.dispatch_signals.offset, layout.routes.offset, layout.stall_signals.offset, self._limit,
            K=spec.top_k, CHUNK=dispatch_low_latency.chunk_of(most_tokens, spec.top_k, spec.group.size),
            RANKS=triton.next_power_of_2(spec.group.size), CLOCK=self._has_clock,
        )  # fmt: skip

    def _most_rows(self, num_tokens_P: Sequence[int]) -> int:
        """Return how many routed rows this rank can receive, counting at least one token a rank.

        Warm-up has one token a rank in its smallest step, so no smaller number needs to be compiled.
        """
        return max(sum(num_tokens_P), len(num_tokens_P)) * min(self._spec.top_k, self._num_experts)

    def _wait(self, signals_at: int, phase: int) -> None:
        spec = self._spec
        signals.wait_for_signals_kernel[(1,)](
            self._peers, self._epoch, spec.group.rank, spec.group.size,
            signals_at, self._layout.stall_signals.offset, self._limit,
            PHASE=phase, RANKS=triton.next_power_of_2(spec.group.size), CLOCK=self._has_clock, num_warps=1,
        )  # fmt: skip

    def _region(self, region: Region) -> Tensor:
        return self._mine[region.offset : region.offset + region.nbytes]


def _as_words(rows: Tensor) -> Tensor:
    return rows.view(torch.uint8).view(torch.int32) if rows.numel() else rows.view(-1).view(torch.int32)
