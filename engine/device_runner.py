"""One rank's step on a GPU. Nothing here waits for the device before `finish`, so a step can be launched while another computes;
but for steps before which experts move.

Steps of single queries replay a CUDA graph, captured before there is a request, for the next larger of a few numbers of
sequences. Rows that fill up belong to no slot: they store nothing, reach no expert, and their outputs are not looked at.

Of several ranks, each sees by itself whether it replays: the exchanges are the same with and without. A graph takes no more
tokens of any rank than its size, which bounds the rows that come here; so ranks without prompts replay the same one, also those
that have no tokens.

T tokens, B sequences, O sampled tokens, V vocabulary, C caches, W blocks of a slot's table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expertwire.comm.all_to_all import Watched
from expertwire.engine import logprobs
from expertwire.engine.batch import CacheRows, ForwardBatch, in_parts
from expertwire.engine.caches import NamedCache, copy_blocks
from expertwire.engine.decoder import Decoder
from expertwire.engine.device_graphs import Capture, Captured
from expertwire.engine.device_slots import DeviceSlots
from expertwire.engine.rank_loop import Launched
from expertwire.engine.routed import NOTHING, RoutedCounts
from expertwire.engine.slot_states import Scheduled
from expertwire.kernels.attention import DeviceSequences
from expertwire.kernels.gpu.batch import look_up
from expertwire.kernels.gpu.sampling import sample
from expertwire.moe.migration import Leg
from expertwire.moe.mover import Mover
from expertwire.scheduler.plan import ExpertMoves, StepPlan, StepResult

# The fields of a sampling record that the kernel takes, in its order.
_COLUMNS = {
    "temperature": torch.float32,
    "top_k": torch.int64,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "seed": torch.int64,
    "branch": torch.int64,
}


@dataclass(frozen=True, kw_only=True)
class _Graph:
    """A captured step of `size` single queries, cut into parts of `sizes`."""

    size: int
    sizes: list[int]
    inputs: list[Tensor]  # of each part, i32, see `_inputs`
    step: Captured  # its hidden states, of the parts one after another

    def run(self, inputs: Sequence[Tensor], parts: Sequence[Scheduled]) -> Tensor:
        """Hidden states of the tokens that the parts have."""
        for kept, given in zip(self.inputs, inputs, strict=True):
            kept.copy_(given)
        self.step.replay()
        rows = [x_TD[: len(part.slot_T)] for x_TD, part in zip(self.step.out.split(self.sizes), parts, strict=True)]
        return rows[0] if len(rows) == 1 else torch.cat(rows)


class DeviceRunner:
    """Runs plans on one rank; `rank_loop.Steps`.

    Args:
        num_ranks: of the group.
        num_parts: in which a step is computed, so that one computes while the others' tokens travel.
        capture: captures steps, `device_graphs.cuda()`; None: none. No use if an all-to-all is not `graph_safe`.
        mover: carries out what plans say of experts; None if they never move. A graph finds the new ones where the old were.
    """

    depth = 2  # steps launched at once: the next one's work lies ready when a step ends

    def __init__(
        self,
        *,
        model: Decoder,
        caches: list[NamedCache],
        slots: DeviceSlots,
        rank: int,
        num_ranks: int,
        num_parts: int = 1,
        capture: Capture | None = None,
        mover: Mover | None = None,
    ) -> None:
        self._model, self._caches, self._slots, self._capture, self._mover = model, caches, slots, capture, mover
        self._rank, self._num_ranks, self._num_parts = rank, num_ranks, num_parts
        self._device = slots.device
        self._on_gpu = slots.device != "cpu"
        self._graph_safe = all(each.graph_safe for each in model.context.all_to_alls)
        self._graphs: list[_Graph] = []  # ascending

    @torch.inference_mode()
    def warm_up(self, max_num_tokens: int, max_running: int) -> None:
        """Compile what is compiled on first use, for every class of tiles that a step can take, and capture the graphs."""
        sizes = [size for size in _sizes(max_running) if size <= max_num_tokens * self._num_parts]
        for size in sizes:
            logits_OV = self._model.logits(self._run_single(size, self._nobodies(size))).contiguous()
        for drawn, filtered in ((False, False), (True, False), (True, True)):
            dtypes = *_COLUMNS.values(), torch.int64
            columns = [torch.zeros(len(logits_OV), dtype=dtype, device=self._device) for dtype in dtypes]
            sample(logits_OV, *columns, drawn=drawn, filtered=filtered)
        size = 1
        while size <= max_num_tokens:
            self._run_prompt(self._nobody(size), size)
            size = max_num_tokens if size < max_num_tokens < 2 * size else 2 * size
        if self._capture is not None and self._graph_safe:
            self._graphs = [self._captured(size, self._capture) for size in reversed(sizes)][::-1]
        self._model.take_expert_load()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """Give the device its work; see `rank_loop.Steps`. All ranks of the group call it with the same plan. It waits only for
        experts that move."""
        mine = plan.rank(self._rank)
        self._slots.apply(mine)
        copy_blocks(self._caches, mine, self._slots.upload)
        load = self._model.take_expert_load() if plan.report_load else np.zeros(0, np.int64)
        answer: dict[str, Any] = {"step": plan.step, "rank": self._rank, "expert_load": load}
        answer["move_us"] = self._move(plan.moves)
        if not plan.num_tokens_P.any():
            nothing: dict[str, Any] = logprobs.no_tokens() | logprobs.no_prompt_rows()
            return Launched(partial(StepResult, **answer, forward_us=0, **nothing))
        started = self._mark()
        parts = self._slots.schedule(mine, self._num_parts)
        step = Scheduled.joined(parts)
        routed = [RoutedCounts.of(self._slots, part, self._model.config) for part in parts]
        asked = [counts for counts in routed if counts is not None]
        graph = None if asked else self._graph_for(step, int(plan.num_tokens_P.max()))
        sizes = [len(part.slot_T) for part in parts] if graph is None else graph.sizes
        inputs = [_inputs(part, size) for part, size in zip(parts, sizes, strict=True)]
        position_O = self._slots.num_tokens[step.slot_O]
        at_O, row_O = self._slots.places(step.slot_O, position_O), step.last_row_B[step.sampled_B]
        slots = [part.slot_B for part in parts]
        *of_parts, row, at, position = self._slots.to_device(*inputs, *slots, row_O, at_O, position_O)
        if graph is not None:
            hidden_TD = graph.run(of_parts[: len(parts)], parts)
        else:
            hidden_TD = self._forward(of_parts, parts, routed, plan.num_tokens_P.tolist())
        prompt = self._prompt_logprobs(hidden_TD, step)
        sampled = self._sample(hidden_TD, step, row, at, position)
        counted = [partial(counts.entries, self._to_host(counts.tokens_LOE).numpy()) for counts in asked]
        ended = self._mark()
        finish = partial(self._finish, answer, prompt, sampled, counted, started, ended)
        return Launched(finish, ended.query) if self._on_gpu else Launched(finish)

    def _move(self, moves: ExpertMoves | None) -> int:
        """How long it took, in µs."""
        if moves is None:
            return 0
        assert self._mover is not None, f"layer {moves.layer} shall move, but nothing is prepared for that"
        if self._on_gpu:  # a rank that has stalled is named now: moving would wait for it, and not say for whom
            torch.cuda.synchronize()
            self._check()
        return self._mover.run(Leg(*moves))

    def _check(self) -> None:
        """Raises `RankStalled` if what the device has computed is void."""
        for all_to_all in self._model.context.all_to_alls:
            if isinstance(all_to_all, Watched):
                all_to_all.check()

    def _finish(
        self,
        answer: dict[str, Any],
        prompt: Callable[[], dict[str, Any]],
        sampled: Callable[[], dict[str, Any]],
        counted: Sequence[Callable[[], np.ndarray]],
        started: Any,
        ended: Any,
    ) -> StepResult:
        elapsed_us = 0
        if self._on_gpu:
            ended.synchronize()
            elapsed_us = int(started.elapsed_time(ended) * 1e3)
        self._check()
        routed = np.concatenate([NOTHING, *(entries() for entries in counted)])
        return StepResult(**answer, forward_us=elapsed_us, **sampled(), **prompt(), routed=routed)

    def _mark(self) -> Any:
        if not self._on_gpu:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    # ---- the model

    def _graph_for(self, step: Scheduled, most_tokens: int) -> _Graph | None:
        """The smallest one that takes the step, and `most_tokens` of another rank."""
        single = step.num_single == len(step.slot_B)
        return next((g for g in self._graphs if g.size >= most_tokens), None) if single else None

    def _forward(
        self,
        of_parts: list[Tensor],
        parts: list[Scheduled],
        routed: list[RoutedCounts | None],
        num_tokens_P: list[int],
    ) -> Tensor:
        """`of_parts`: the inputs of each part, then the slots of each."""
        inputs, slots = of_parts[: len(parts)], of_parts[len(parts) :]
        each = zip(inputs, slots, parts, in_parts(num_tokens_P, len(parts)), strict=True)
        batches = [self._batch_of(*part) for part in each]
        told = [
            batch if counts is None else replace(batch, routed=counts.add)
            for batch, counts in zip(batches, routed, strict=True)
        ]
        return self._model.forward(told, self._caches)

    def _batch_of(self, inputs: Tensor, slot_B: Tensor, step: Scheduled, num_tokens_P: list[int]) -> ForwardBatch:
        num_tokens, num_sequences = len(step.slot_T), len(step.slot_B)
        tables_CBW = self._slots.blocks_CSW.index_select(1, slot_B)
        longest = int(step.length_B.max(initial=1)), int(step.length_B[step.num_single :].max(initial=1))
        return self._batch(inputs, num_tokens, num_sequences, step.num_single, tables_CBW, longest, num_tokens_P)

    def _batch(
        self,
        inputs: Tensor,
        num_tokens: int,
        num_sequences: int,
        num_single: int,
        tables_CBW: Tensor,
        longest: tuple[int, int],
        num_tokens_P: list[int],
    ) -> ForwardBatch:
        room = _room(num_tokens)
        slot_T, position_T = inputs[:num_tokens], inputs[room : room + num_tokens]
        lengths, cu_queries = (
            inputs[2 * room : 2 * room + num_sequences],
            inputs[3 * room : 3 * room + num_sequences + 1],
        )
        slots = self._slots
        token_T, positions_T, mapping_CT = look_up(
            slot_T, position_T, slots.tokens_SL, slots.blocks_CSW, slots.block_size
        )
        return ForwardBatch(
            token_ids_T=token_T,
            positions_T=positions_T,
            caches=tuple(
                CacheRows(
                    slot_mapping_T=mapping_T,
                    sequences=DeviceSequences(
                        num_single=num_single,
                        max_length=longest[0],
                        max_prompt_length=longest[1],
                        cu_queries=cu_queries,
                        lengths=lengths,
                        block_table=table_BW,
                    ),
                )
                for mapping_T, table_BW in zip(mapping_CT, tables_CBW, strict=True)
            ),
            num_tokens_P=num_tokens_P,
            num_valid=inputs[-4:-3] if self._graph_safe else None,
        )

    def _run_single(self, size: int, inputs: list[Tensor]) -> Tensor:
        """Single queries, some of which may be nobody's: all that a graph holds. `inputs`: of each part."""
        batches = []
        for given, num_tokens_P in zip(inputs, in_parts([size] * self._num_ranks, self._num_parts), strict=True):
            num = num_tokens_P[self._rank]
            tables_CBW = self._slots.blocks_CSW.index_select(1, given[:num].clamp(min=0))
            longest = tables_CBW.shape[2] * self._slots.block_size
            batches.append(self._batch(given, num, num, num, tables_CBW, (longest, 0), num_tokens_P))
        return self._model.forward(batches, self._caches)

    def _run_prompt(self, inputs: Tensor, size: int) -> None:
        """Tokens that are nobody's, as if they were the last ones of a long prompt, then all of one."""
        tables_CBW = self._slots.blocks_CSW[:, :1]
        most = tables_CBW.shape[2] * self._slots.block_size
        num_tokens_P = [size] * self._num_ranks
        for longest in (most, min(size, most)) if self._model.context.ops.fast else (most,):
            batch = self._batch(inputs, size, 1, 0, tables_CBW, (longest, longest), num_tokens_P)
            self._model.forward([batch] * self._num_parts, self._caches)

    def _nobody(self, size: int) -> Tensor:
        """Inputs of tokens that belong to no slot."""
        inputs = np.zeros(4 * _room(size) + 8, np.int32)
        inputs[:size] = -1
        return self._slots.to_device(inputs)[0].clone()

    def _nobodies(self, size: int) -> list[Tensor]:
        """`_nobody` of each part of so many tokens."""
        return [self._nobody(num) for [num] in in_parts([size], self._num_parts)]

    def _captured(self, size: int, capture: Capture) -> _Graph:
        inputs = self._nobodies(size)
        sizes = [num for [num] in in_parts([size], self._num_parts)]
        return _Graph(size=size, sizes=sizes, inputs=inputs, step=capture(partial(self._run_single, size, inputs)))

    # ---- sampling

    def _sample(
        self, hidden_TD: Tensor, step: Scheduled, row_O: Tensor, at_O: Tensor, position_O: Tensor
    ) -> Callable[[], dict[str, np.ndarray]]:
        """Sample and write down the tokens; what the result says of them, once the device is done."""
        if not len(row_O):
            return logprobs.no_tokens
        state = self._slots.sampling[step.slot_O]
        logits_OV = self._model.logits(hidden_TD.index_select(0, row_O)).contiguous()
        raw_OV = logits_OV.clone() if (state["logprobs"] >= 0).any() else logits_OV
        self._slots.adjust(logits_OV, step.slot_O)
        columns = [self._slots.upload(state[name]).to(dtype) for name, dtype in _COLUMNS.items()]
        columns.append(position_O.long())
        token_O = sample(
            logits_OV,
            *columns,
            drawn=bool(state["temperature"].any()),
            filtered=bool(((state["top_k"] > 0) | (state["top_p"] < 1)).any()),
        )
        self._slots.append(step, at_O, token_O)
        found = logprobs.of(raw_OV, token_O, state["logprobs"])
        tokens = self._to_host(token_O.int())
        picked = [self._to_host(tensor) for tensor in found]
        return lambda: {
            "slot_O": step.slot_O.astype(np.int32),
            "token_O": tokens.numpy(),
            **logprobs.fields([tensor.numpy() for tensor in picked], state["logprobs"], logits_OV.shape[1]),
        }

    def _to_host(self, tensor: Tensor) -> Tensor:
        """A copy that is there when the step's end is."""
        if not self._on_gpu:
            return tensor
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        copy.copy_(tensor, non_blocking=True)
        return copy

    def _prompt_logprobs(self, hidden_TD: Tensor, step: Scheduled) -> Callable[[], dict[str, np.ndarray]]:
        """Rows for every prompt token computed in this step whose successor is a prompt token too."""
        rows = logprobs.prompt_rows(self._slots.sampling, step)
        if rows is None:
            return logprobs.no_prompt_rows
        row_X, slot_X, position_X = rows
        at_X = self._slots.places(slot_X, position_X)
        logits_XV = self._model.logits(hidden_TD.index_select(0, self._slots.upload(row_X)))
        token_X = self._slots.tokens_SL.view(-1).index_select(0, self._slots.upload(at_X))
        num_top_X = self._slots.sampling["prompt_logprobs"][slot_X]
        picked = [self._to_host(tensor) for tensor in logprobs.of(logits_XV, token_X, num_top_X)]
        vocab = logits_XV.shape[1]
        return lambda: logprobs.prompt_fields(
            slot_X, position_X, logprobs.fields([tensor.numpy() for tensor in picked], num_top_X, vocab)
        )


def _room(count: int) -> int:
    """`count` rounded up, so that what lies behind so many i32 begins at a multiple of 16 bytes."""
    return -(-count // 4) * 4


def _inputs(step: Scheduled, size: int) -> np.ndarray:
    """A step's numbers for the device, where `size` tokens have room: slots and positions of the tokens, lengths of the sequences
    and `cu_queries`, each with room for `size`, and the number of tokens."""
    count, room = len(step.slot_T), _room(size)
    inputs = np.zeros(4 * room + 8, np.int32)
    inputs[:size] = -1
    inputs[:count] = step.slot_T
    inputs[room : room + count] = step.position_T
    inputs[2 * room : 2 * room + len(step.length_B)] = step.length_B
    inputs[3 * room : 3 * room + size + 1] = count
    inputs[3 * room : 3 * room + len(step.cu_queries)] = step.cu_queries
    inputs[-4] = count
    return inputs


def _sizes(max_running: int) -> list[int]:
    """Numbers of sequences to capture: doubling to 8, by eights to 64, from there on by an eighth."""
    sizes, size = [], 1
    while size < max_running:
        sizes.append(size)
        size += max(1, size if size < 8 else 8 if size < 64 else size // 8)
    return [*sizes, max_running]
