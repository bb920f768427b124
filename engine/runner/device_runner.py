"""One rank's step on a GPU. Nothing here waits for the device before `finish`, so a step can be launched while another computes;
but for steps before which experts move.

Small steps replay a CUDA graph, captured before there is a request: steps of decodes for the next larger of a few numbers of
sequences, mixed steps for the next larger of a few numbers of tokens, of which the device knows how many are decodes. Rows that
fill up belong to no slot: they store nothing, reach no expert, and their outputs are not looked at.

Of several ranks, each sees by itself whether it replays: the exchanges are the same with and without. A graph is for a number of
this rank's tokens and a bound on any other's, which bounds the rows that come here: so many, or all that a step can have, for
steps in which others compute long prompts.

T tokens, B sequences, O sampled tokens, V vocabulary, C caches, W blocks of a slot's table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from expertwire.comm.all_to_all.base import Checkable
from expertwire.engine.kv_cache.caches import NamedCache, copy_blocks
from expertwire.engine.models.decoder import Decoder
from expertwire.engine.rank_loop import Launched
from expertwire.engine.runner import logprobs
from expertwire.engine.runner.batch import ForwardBatch, in_parts
from expertwire.engine.runner.cuda_graphs import Capture, Captured
from expertwire.engine.runner.device_slots import DeviceSlots
from expertwire.engine.runner.graph_sizes import GraphSize, graph_sizes
from expertwire.engine.runner.routed_experts import NOTHING, RoutedCounts
from expertwire.engine.runner.slot_states import Scheduled
from expertwire.engine.runner.staging import Downloads, memory_of
from expertwire.kernels.gpu import penalties
from expertwire.kernels.gpu.prepare_inputs import prepare_inputs
from expertwire.kernels.gpu.sampling import sample
from expertwire.kernels.ops.attention import AttentionMetadata
from expertwire.kernels.ops.sampling import DRAW_PARAMETERS, token_logprobs
from expertwire.moe.eplb.mover import ExpertMover
from expertwire.scheduler.plan import ExpertMoves, RankPlan, StepPlan, StepResult


class Found(NamedTuple):
    """Part of a step's result: tensors on the device, and what the host makes of them as arrays."""

    tensors: Sequence[Tensor]
    make: Callable[[list[np.ndarray]], dict[str, Any]]


class _Bounds(NamedTuple):
    """See `AttentionMetadata`."""

    max_decodes: int
    max_prefills: int
    max_prefill_tokens: int
    max_seq_len: int
    max_prefill_len: int


@dataclass(frozen=True, kw_only=True)
class _Graph:
    """A captured step, cut into parts of `sizes`."""

    size: GraphSize
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
        mover: ExpertMover | None = None,
    ) -> None:
        self._model, self._caches, self._slots, self._capture, self._mover = model, caches, slots, capture, mover
        self._rank, self._num_ranks, self._num_parts = rank, num_ranks, num_parts
        self._device = slots.device
        self._on_gpu = slots.device.startswith("cuda")
        self._graph_safe = all(each.graph_safe for each in model.context.all_to_alls)
        self._downloads = Downloads(memory_of(slots.device), self.depth + 1)
        self._graphs: list[_Graph] = []  # in the order of their sizes

    @torch.inference_mode()
    def warm_up(self, max_num_batched_tokens: int, max_num_seqs: int) -> None:
        """Compile what is compiled on first use, for every class of tiles that a step can take, and capture the graphs."""
        sizes = self.graph_sizes(max_num_batched_tokens, max_num_seqs)
        if self._capture is not None and self._graph_safe:
            self._graphs = [self._captured(size, self._capture) for size in reversed(sizes)][::-1]
        else:
            for size in sizes:
                self._run_padded(size, self._nobodies(size.num_tokens))
        hidden_TD = self._run_short()
        for num in dict.fromkeys(min(size.num_tokens, max_num_seqs) for size in sizes):
            logits_OV = self._model.logits(hidden_TD[:1].repeat(num, 1)).contiguous()
        for drawn, filtered in ((False, False), (True, False), (True, True)):
            dtypes = *DRAW_PARAMETERS.values(), np.int64
            columns = self._slots.uploads(*(np.zeros(len(logits_OV), dtype) for dtype in dtypes))
            sample(logits_OV, *columns, drawn=drawn, filtered=filtered)
        penalties.warm_up(logits_OV, self._slots.tokens_SL)
        length = 1
        while length <= max_num_batched_tokens:
            self._run_prompt(self._nobody(length), length)
            length = max_num_batched_tokens if length < max_num_batched_tokens < 2 * length else 2 * length
        self._model.take_expert_load()

    def graph_sizes(self, max_num_batched_tokens: int, max_num_seqs: int) -> list[GraphSize]:
        """Return the steps to capture, of ranks with up to so many tokens in a part of a step, and no more than one exchange
        takes: of how many exchanges a step has, the plan decides and not a bound."""
        exchange_tokens = self._model.context.exchange_tokens
        most = max_num_batched_tokens if exchange_tokens is None else min(max_num_batched_tokens, exchange_tokens)
        return graph_sizes(most * self._num_parts, max_num_seqs, self._num_ranks)

    @torch.inference_mode()
    def run_largest_graph(self, max_num_batched_tokens: int, max_num_seqs: int) -> None:
        """Run the largest step that `warm_up` captures, with no one's tokens."""
        sizes = self.graph_sizes(max_num_batched_tokens, max_num_seqs)
        size = max(sizes, key=lambda size: (size.num_tokens, size.max_others, size.is_mixed))
        self._run_padded(size, self._nobodies(size.num_tokens))

    @torch.inference_mode()
    def run_peak(self, max_num_batched_tokens: int, max_num_seqs: int) -> None:
        """Run what takes most memory, with no one's tokens: a full step of all ranks, and logits of all requests that run."""
        self._run_prompt(self._nobody(max_num_batched_tokens), max_num_batched_tokens)
        config = self._model.config
        x_XD = torch.zeros(max_num_seqs, config.hidden_size, dtype=self._model.context.dtype, device=self._device)
        logits_OV = self._model.logits(x_XD).contiguous()
        raw_OV = logits_OV.clone()  # as where log-probabilities are asked for
        del logits_OV, raw_OV
        self._model.take_expert_load()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """Give the device its work; see `rank_loop.Steps`. All ranks of the group call it with the same plan. It waits only for
        experts that move."""
        mine = plan.rank(self._rank)
        changes = self._slots.changes(mine)
        load = self._model.take_expert_load() if plan.report_load else np.zeros(0, np.int64)
        answer: dict[str, Any] = {"step": plan.step, "rank": self._rank, "expert_load": load}
        answer["move_us"] = self._move(plan.moves)
        if not plan.num_tokens_P.any():
            self._change(mine, self._slots.uploads(*changes))
            nothing: dict[str, Any] = logprobs.no_tokens() | logprobs.no_prompt_rows()
            return Launched(partial(StepResult, **answer, forward_us=0, **nothing))
        started = self._mark()
        parts = self._slots.schedule(mine, self._num_parts)
        step = Scheduled.joined(parts)
        routed = [RoutedCounts.of(self._slots, part, self._model.config) for part in parts]
        asked = [counts for counts in routed if counts is not None]
        graph = None if asked else self._graph_for(step, plan.num_tokens_P)
        sizes = [len(part.slot_T) for part in parts] if graph is None else graph.sizes
        inputs = [_inputs(part, size) for part, size in zip(parts, sizes, strict=True)]
        position_O = self._slots.num_tokens[step.slot_O]
        at_O, row_O = self._slots.places(step.slot_O, position_O), step.last_row_B[step.sampled_B]
        columns = self._columns(step.slot_O)
        adjustments = self._slots.adjustments(step.slot_O)
        sampling = [*adjustments, row_O, at_O, *columns, position_O]
        uploaded = self._slots.uploads(*changes, *inputs, *sampling)
        self._change(mine, uploaded[: len(changes)])
        of_parts, of_rows = uploaded[len(changes) : -len(sampling)], uploaded[-len(sampling) :]
        if graph is not None:
            hidden_TD = graph.run(of_parts, parts)
        else:
            hidden_TD = self._forward(of_parts, parts, routed, plan.num_tokens_P.tolist())
        found = [
            self._prompt_logprobs(hidden_TD, step),
            self._sample(hidden_TD, step, of_rows[: len(adjustments)], *of_rows[len(adjustments) :]),
            *(Found([counts.tokens_LOE], partial(_routed, counts)) for counts in asked),
        ]
        home = self._downloads([tensor for tensors, _ in found for tensor in tensors])
        ended = self._mark()
        finish = partial(self._finish, answer, found, home, started, ended)
        return Launched(finish, ended.query) if self._on_gpu else Launched(finish)

    def _change(self, plan: RankPlan, changes: Sequence[Tensor]) -> None:
        """What the plan says of slots and blocks, on the device."""
        self._slots.write(changes)
        copy_blocks(self._caches, plan, self._slots.upload)

    def _move(self, moves: ExpertMoves | None) -> int:
        """How long it took, in µs."""
        if moves is None:
            return 0
        assert self._mover is not None, f"layer {moves.layer} shall move, but nothing is prepared for that"
        self.settle()  # a rank that has stalled is named now: moving would wait for it, and not say for whom
        return self._mover.move(moves)

    def settle(self) -> None:
        """Wait until the device has done what it was given.

        Raises:
            RankStalled: it is void, as another rank has not come.
        """
        if self._on_gpu:
            torch.cuda.synchronize()
            self._check()

    def _check(self) -> None:
        """Raises `RankStalled` if what the device has computed is void."""
        for all_to_all in self._model.context.all_to_alls:
            if isinstance(all_to_all, Checkable):
                all_to_all.check()

    def _finish(
        self,
        answer: dict[str, Any],
        found: Sequence[Found],
        home: Callable[[], list[np.ndarray]],
        started: Any,
        ended: Any,
    ) -> StepResult:
        elapsed_us = 0
        if self._on_gpu:
            ended.synchronize()
            elapsed_us = int(started.elapsed_time(ended) * 1e3)
        self._check()
        arrays = iter(home())
        prompt, sampled, *counted = [make(list(islice(arrays, len(tensors)))) for tensors, make in found]
        routed = np.concatenate([NOTHING, *(part["routed"] for part in counted)])
        return StepResult(**answer, forward_us=elapsed_us, **sampled, **prompt, routed=routed)

    def _mark(self) -> Any:
        if not self._on_gpu:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    # ---- the model

    def _graph_for(self, step: Scheduled, num_tokens_P: np.ndarray) -> _Graph | None:
        """The first one that takes the step, and the tokens of the other ranks."""
        num_tokens, only_decodes = len(step.slot_T), step.num_decodes == len(step.slot_B)
        others = int(np.delete(num_tokens_P, self._rank).max(initial=0))
        for graph in self._graphs:
            size = graph.size
            if size.num_tokens >= num_tokens and size.max_others >= others and (size.is_mixed or only_decodes):
                return graph
        return None

    def _forward(
        self,
        inputs: list[Tensor],
        parts: list[Scheduled],
        routed: list[RoutedCounts | None],
        num_tokens_P: list[int],
    ) -> Tensor:
        each = zip(inputs, parts, in_parts(num_tokens_P, len(parts)), strict=True)
        batches = [self._batch_of(*part) for part in each]
        told = [
            batch if counts is None else replace(batch, routed=counts.add)
            for batch, counts in zip(batches, routed, strict=True)
        ]
        return self._model.forward(told, self._caches)

    def _batch_of(self, inputs: Tensor, step: Scheduled, num_tokens_P: list[int]) -> ForwardBatch:
        num_tokens, num_sequences = len(step.slot_T), len(step.slot_B)
        tables_CBW = self._slots.blocks_CSW.index_select(1, _slots_of(inputs, num_tokens)[:num_sequences])
        num = step.num_decodes
        bounds = _Bounds(
            max_decodes=num,
            max_prefills=num_sequences - num,
            max_prefill_tokens=num_tokens - num,
            max_seq_len=int(step.length_B.max(initial=1)),
            max_prefill_len=int(step.length_B[num:].max(initial=1)),
        )
        return self._batch(inputs, num_tokens, tables_CBW, bounds, num_tokens_P)

    def _batch(
        self,
        inputs: Tensor,
        num_tokens: int,
        tables_CBW: Tensor,
        bounds: _Bounds,
        num_tokens_P: list[int],
    ) -> ForwardBatch:
        room, num_sequences = _room(num_tokens), tables_CBW.shape[1]
        slot_T, position_T = inputs[:num_tokens], inputs[room : room + num_tokens]
        seq_lens, cu_seqlens_q = (
            inputs[2 * room : 2 * room + num_sequences],
            inputs[4 * room : 4 * room + num_sequences + 1],
        )
        slots = self._slots
        token_T, positions_T, mapping_CT = prepare_inputs(
            slot_T, position_T, slots.tokens_SL, slots.blocks_CSW, slots.block_size
        )
        return ForwardBatch(
            token_ids_T=token_T,
            positions_T=positions_T,
            attention_metadata=tuple(
                AttentionMetadata(
                    num_decodes=inputs[-4:-3],
                    **bounds._asdict(),
                    cu_seqlens_q=cu_seqlens_q,
                    seq_lens=seq_lens,
                    block_table=table_BW,
                    slot_mapping=mapping_T,
                )
                for mapping_T, table_BW in zip(mapping_CT, tables_CBW, strict=True)
            ),
            num_tokens_P=num_tokens_P,
            num_valid=inputs[-8:-7] if self._graph_safe else None,
        )

    def _run_padded(self, size: GraphSize, inputs: list[Tensor]) -> Tensor:
        """A step of which some tokens may be nobody's: all that a graph holds. `inputs`: of each part."""
        batches = []
        tokens_P = size.tokens_P(self._rank, self._num_ranks)
        for given, num_tokens_P in zip(inputs, in_parts(tokens_P, self._num_parts), strict=True):
            num = num_tokens_P[self._rank]
            tables_CBW = self._slots.blocks_CSW.index_select(1, _slots_of(given, num))
            longest, most = tables_CBW.shape[2] * self._slots.block_size, min(num, self._slots.num_slots)
            bounds = (
                _Bounds(most, max(1, min(num // 2, most)), num, longest, longest)
                if size.is_mixed
                else _Bounds(num, 0, 0, longest, 0)
            )
            batches.append(self._batch(given, num, tables_CBW, bounds, num_tokens_P))
        return self._model.forward(batches, self._caches)

    def _run_prompt(self, inputs: Tensor, size: int) -> None:
        """Tokens that are nobody's, as if they were the last ones of a long prompt, then all of one."""
        tables_CBW = self._slots.blocks_CSW[:, :1]
        most = tables_CBW.shape[2] * self._slots.block_size
        num_tokens_P = [size] * self._num_ranks
        for longest in (most, min(size, most)) if self._model.context.ops.fast else (most,):
            bounds = _Bounds(0, 1, size, longest, longest)
            batch = self._batch(inputs, size, tables_CBW, bounds, num_tokens_P)
            self._model.forward([batch] * self._num_parts, self._caches)

    def _run_short(self) -> Tensor:
        """A decode of few tokens, launched by itself: its keys are not split, which is another kernel. Its hidden states."""
        inputs = self._nobody(1)
        tokens_P = [1] * self._num_ranks
        batch = self._batch(inputs, 1, self._slots.blocks_CSW[:, :1], _Bounds(1, 0, 0, 1, 0), tokens_P)
        return self._model.forward([batch] * self._num_parts, self._caches)

    def _nobody(self, size: int) -> Tensor:
        """Inputs of tokens that belong to no slot."""
        inputs = np.zeros(5 * _room(size) + 12, np.int32)
        inputs[:size] = -1
        return self._slots.upload(inputs).clone()

    def _nobodies(self, size: int) -> list[Tensor]:
        """`_nobody` of each part of so many tokens."""
        return [self._nobody(num) for [num] in in_parts([size], self._num_parts)]

    def _captured(self, size: GraphSize, capture: Capture) -> _Graph:
        inputs = self._nobodies(size.num_tokens)
        sizes = [num for [num] in in_parts([size.num_tokens], self._num_parts)]
        return _Graph(size=size, sizes=sizes, inputs=inputs, step=capture(partial(self._run_padded, size, inputs)))

    # ---- sampling

    def _columns(self, slot_O: np.ndarray) -> list[np.ndarray]:
        state = self._slots.sampling[slot_O]
        return [state[name].astype(dtype) for name, dtype in DRAW_PARAMETERS.items()]

    def _sample(
        self,
        hidden_TD: Tensor,
        step: Scheduled,
        adjustments: Sequence[Tensor],
        row_O: Tensor,
        at_O: Tensor,
        *columns: Tensor,
    ) -> Found:
        """Sample and write down the tokens, and what the result says of them."""
        if not len(row_O):
            return Found([], lambda _: logprobs.no_tokens())
        state = self._slots.sampling[step.slot_O]
        logits_OV = self._model.logits(hidden_TD.index_select(0, row_O)).contiguous()
        raw_OV = logits_OV.clone() if (state["logprobs"] >= 0).any() else logits_OV
        self._slots.adjust_on_device(logits_OV, adjustments, step.slot_O)
        token_O = sample(
            logits_OV,
            *columns,
            drawn=bool(state["temperature"].any()),
            filtered=bool(((state["top_k"] > 0) | (state["top_p"] < 1)).any()),
        )
        self._slots.append(step, at_O, token_O)
        picked = logprobs.of(raw_OV, token_O, state["logprobs"], self._slots.upload)
        vocab = logits_OV.shape[1]
        return Found(
            [token_O, *picked],
            lambda arrays: {
                "slot_O": step.slot_O.astype(np.int32),
                "token_O": arrays[0].astype(np.int32),
                **logprobs.fields(arrays[1:], state["logprobs"], vocab),
            },
        )

    def _prompt_logprobs(self, hidden_TD: Tensor, step: Scheduled) -> Found:
        """Rows for every prompt token computed in this step whose successor is a prompt token too; logits of as many at a time as
        `run_peak` has room for: those of a whole step may take more than all that is left."""
        rows = logprobs.prompt_rows(self._slots.sampling, step)
        if rows is None:
            return Found([], lambda _: logprobs.no_prompt_rows())
        row_X, slot_X, position_X = rows
        at_X = self._slots.places(slot_X, position_X)
        at_row_X, at_token_X = self._slots.uploads(row_X, at_X)
        token_X = self._slots.tokens_SL.view(-1).index_select(0, at_token_X).long()
        num_top_X, vocab = self._slots.sampling["prompt_logprobs"][slot_X], self._model.config.vocab_size
        widest, most = int(np.minimum(num_top_X, vocab).max()), self._slots.num_slots
        portions = [
            token_logprobs(self._model.logits(hidden_TD.index_select(0, at_row)), token, widest)
            for at_row, token in zip(at_row_X.split(most), token_X.split(most), strict=True)
        ]
        return Found(
            [torch.cat(parts) for parts in zip(*portions, strict=True)],
            lambda arrays: logprobs.prompt_fields(slot_X, position_X, logprobs.fields(arrays, num_top_X, vocab)),
        )


def _routed(counts: RoutedCounts, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
    return {"routed": counts.entries(arrays[0])}


def _room(count: int) -> int:
    """`count` rounded up, so that what lies behind so many i32 begins at a multiple of 16 bytes."""
    return -(-count // 4) * 4


def _slots_of(inputs: Tensor, num: int) -> Tensor:
    """The slots of the first sequences, i32, of the inputs of so many tokens; 0 where there is none."""
    room = _room(num)
    return inputs[3 * room : 3 * room + num]


def _inputs(step: Scheduled, size: int) -> np.ndarray:
    """A step's numbers for the device, where `size` tokens have room: slots and positions of the tokens, lengths and slots of the
    sequences and `cu_seqlens_q`, each with room for `size`, the number of tokens and that of decodes."""
    count, room = len(step.slot_T), _room(size)
    inputs = np.zeros(5 * room + 12, np.int32)
    inputs[:size] = -1
    inputs[:count] = step.slot_T
    inputs[room : room + count] = step.position_T
    inputs[2 * room : 2 * room + len(step.length_B)] = step.length_B
    inputs[3 * room : 3 * room + len(step.slot_B)] = step.slot_B
    inputs[4 * room : 4 * room + size + 1] = count
    inputs[4 * room : 4 * room + len(step.cu_seqlens_q)] = step.cu_seqlens_q
    inputs[-8], inputs[-4] = count, step.num_decodes
    return inputs
