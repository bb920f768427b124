"""One rank's steps: update the input batch by the plan, run the model, sample, return the result.

On a GPU (`Ops.on_device`) a step is launched while another computes: nothing here waits for the device before `finish`, but for
steps before which experts move or that report the experts' load; small steps replay CUDA graphs (`cuda_graphs`), copies go
through pinned memory (`staging`). On a CPU a step is computed when it is finished, so that the result before it is sent first.

T tokens, S sequences, D model width, O sampled rows, V vocabulary, P ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate, islice, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from expertwire.comm.all_to_all.base import Checkable
from expertwire.engine.kv_cache.caches import NamedCache, copy_blocks
from expertwire.engine.models.decoder import Decoder
from expertwire.engine.rank_loop import Launched
from expertwire.engine.runner import logprobs, non_finite
from expertwire.engine.runner.batch import ForwardBatch
from expertwire.engine.runner.cuda_graphs import Capture, GraphSize, StepGraph, graph_sizes
from expertwire.engine.runner.dummy_steps import DummySteps
from expertwire.engine.runner.input_batch import InputBatch
from expertwire.engine.runner.micro_batch import MicroBatch, PackedInputs, micro_batches, split_tokens
from expertwire.engine.runner.routed_experts import NOTHING, RoutedCounts
from expertwire.engine.runner.staging import (
    Download,
    Downloads,
    Upload,
    Uploads,
    download_nowhere,
    memory_of,
    upload_nowhere,
)
from expertwire.engine.runner.thinking import Thinking
from expertwire.engine.runner.timeline import CudaTimeline, HostTimeline, Timeline
from expertwire.kernels.ops.sampling import DRAW_PARAMETERS, Draws, token_logprobs
from expertwire.moe.eplb.mover import ExpertMover
from expertwire.scheduler.plan import ExpertMoves, RankPlan, StepPlan, StepResult


class _Output(NamedTuple):
    """Part of a step's result: tensors on the device, and the function that makes fields of their arrays on the host."""

    tensors: Sequence[Tensor]
    fields: Callable[[list[np.ndarray]], Mapping[str, Any]]


class ModelRunner:
    """Runs plans on one rank; `rank_loop.Steps`.

    Args:
        num_ranks: ranks in the group.
        max_num_seqs: most requests that run at once.
        max_model_len: most tokens of a request.
        block_size: tokens in a block of the caches.
        num_micro_batches: into which a step is cut, so that one computes while another's tokens are exchanged.
        capture: captures steps, `cuda_graphs.cuda()`; None: none. Unused if an all-to-all is not `graph_safe`.
        mover: moves experts between ranks; None if they never move. A graph finds the new ones where the old were.
        thinking: controls the reasoning of requests; None if none asks for that.

    Attributes:
        depth: steps that can be launched at once; 2 on a GPU, where the next step's work is queued when one ends.
    """

    def __init__(
        self,
        *,
        model: Decoder,
        caches: Sequence[NamedCache],
        num_ranks: int,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        num_micro_batches: int = 1,
        capture: Capture | None = None,
        mover: ExpertMover | None = None,
        thinking: Thinking | None = None,
    ) -> None:
        context = model.context
        self._model, self._caches, self._capture, self._mover, self._thinking = model, caches, capture, mover, thinking
        self._ops, self._device, self._rank, self._num_ranks = context.ops, context.device, context.rank, num_ranks
        self._num_micro_batches = num_micro_batches
        self._copies = [context.ops.copy_blocks(cache.tensors()) for cache in caches]
        self.depth = 2 if context.ops.on_device else 1
        self._upload: Upload = upload_nowhere
        self._download: Download = download_nowhere
        if context.ops.on_device:
            memory = memory_of(context.device)
            self._upload, self._download = Uploads(context.device, memory), Downloads(memory, self.depth + 1)
        self._timeline: Timeline = CudaTimeline() if context.device.startswith("cuda") else HostTimeline()
        self._checkable = [each for each in context.all_to_alls if isinstance(each, Checkable)]
        self.batch = InputBatch(
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            block_size=block_size,
            specs=[cache.spec for cache in caches],
            device=context.device,
            ops=context.ops,
            thinking=thinking,
        )
        self._is_padded = context.ops.on_device and all(each.graph_safe for each in context.all_to_alls)
        self._dummy = DummySteps(
            model,
            caches,
            self.batch,
            num_ranks=num_ranks,
            num_micro_batches=num_micro_batches,
            is_padded=self._is_padded,
            upload=self._upload,
        )
        self._graphs: list[StepGraph] = []  # in the order of their sizes

    # ---- warm-up and memory

    @torch.inference_mode()
    def warm_up(self, max_num_batched_tokens: int, max_num_seqs: int) -> None:
        """Run what is compiled or allocated on first use, on all ranks together. On a GPU that is every class of tiles that a
        step can take; then the graphs are captured.

        Args:
            max_num_batched_tokens: most tokens of a rank in a micro-batch.
        """
        if self._ops.on_device:
            self._warm_up_on_device(max_num_batched_tokens, max_num_seqs)
        else:
            if self._rank % 2:  # ranks of a machine share compiled code, so half of them begin with another part
                self._model.run_experts_alone()
            for num in range(1, min(2, max_num_batched_tokens) + 1):
                self._model.logits(self._dummy.run_in_null_block(num)).argmax(dim=-1)
        self._model.take_expert_load()

    def _warm_up_on_device(self, max_num_batched_tokens: int, max_num_seqs: int) -> None:
        sizes = self.graph_sizes(max_num_batched_tokens, max_num_seqs)
        if self._capture is not None and self._is_padded:
            self._graphs = [self._captured(size, self._capture) for size in reversed(sizes)][::-1]
        else:
            for size in sizes:
                self._dummy.run_padded(size, self._dummy.inputs(size.num_tokens))
        hidden_TD = self._dummy.run_short_decode()
        for num in dict.fromkeys(min(size.num_tokens, max_num_seqs) for size in sizes):
            logits_OV = self._model.logits(hidden_TD[:1].repeat(num, 1)).contiguous()
        self._warm_up_sampling(logits_OV)
        null_1 = torch.zeros(1, dtype=torch.int64, device=self._device)
        for copy in self._copies:
            copy(null_1, null_1)
        length = 1
        while length <= max_num_batched_tokens:
            self._dummy.run_prompt(length)
            length = max_num_batched_tokens if length < max_num_batched_tokens < 2 * length else 2 * length

    def _warm_up_sampling(self, logits_OV: Tensor) -> None:
        num = len(logits_OV)
        for drawn, filtered in ((False, False), (True, False), (True, True)):
            columns = self._upload(*(np.zeros(num, dtype) for dtype in (*DRAW_PARAMETERS.values(), np.int64)))
            self._ops.sample(logits_OV, Draws(*columns), drawn=drawn, filtered=filtered)
        id_1 = torch.zeros(1, dtype=torch.int32, device=logits_OV.device)
        zero_1 = logits_OV.new_zeros(1)
        parameters = zero_1 + 1, zero_1, zero_1
        self._ops.penalize(logits_OV, id_1, id_1, id_1, id_1, parameters, self.batch.token_ids, 1)
        self._ops.add_to_logits(logits_OV, id_1, id_1, zero_1)

    def _captured(self, size: GraphSize, capture: Capture) -> StepGraph:
        inputs = self._dummy.inputs(size.num_tokens)
        return StepGraph(size=size, inputs=inputs, step=capture(partial(self._dummy.run_padded, size, inputs)))

    def graph_sizes(self, max_num_batched_tokens: int, max_num_seqs: int) -> list[GraphSize]:
        """Return the steps to capture, of ranks with up to so many tokens in a micro-batch, and no more than one exchange takes:
        the plan decides how many exchanges a step has, and not a bound."""
        exchange_tokens = self._model.context.exchange_tokens
        most = max_num_batched_tokens if exchange_tokens is None else min(max_num_batched_tokens, exchange_tokens)
        return graph_sizes(most * self._num_micro_batches, max_num_seqs, self._num_ranks)

    @torch.inference_mode()
    def run_largest_graph(self, max_num_batched_tokens: int, max_num_seqs: int) -> None:
        """Run the largest step that `warm_up` captures, without requests."""
        sizes = self.graph_sizes(max_num_batched_tokens, max_num_seqs)
        size = max(sizes, key=lambda size: (size.num_tokens, size.max_others, size.is_mixed))
        self._dummy.run_padded(size, self._dummy.inputs(size.num_tokens))

    @torch.inference_mode()
    def run_peak(self, max_num_batched_tokens: int, max_num_seqs: int) -> None:
        """Run what takes most memory, without requests: a full step of all ranks, and logits and log-probabilities of all
        requests that can run, which take more than the candidates of sampling."""
        self._dummy.run_prompt(max_num_batched_tokens)
        config = self._model.config
        x_OD = torch.zeros(max_num_seqs, config.hidden_size, dtype=self._model.context.dtype, device=self._device)
        logits_OV = self._model.logits(x_OD).contiguous()
        raw_OV = logits_OV.clone()  # as where log-probabilities are asked for
        token_O = torch.zeros(max_num_seqs, dtype=torch.int64, device=self._device)
        num_top_O = np.zeros(max_num_seqs, np.int32)
        num_top_O[1:2] = -1  # where one row does not ask, those that do are copied
        logprobs.of(raw_OV, token_O, num_top_O, self._upload)
        del logits_OV, raw_OV
        self._model.take_expert_load()

    # ---- steps

    def launch(self, plan: StepPlan) -> Launched:
        """Launch a step, see `rank_loop.Steps`. All ranks of the group call it with the same plan."""
        return self._execute(plan) if self._ops.on_device else Launched(lambda: self._execute(plan).finish())

    @torch.inference_mode()
    def _execute(self, plan: StepPlan) -> Launched:
        rank_plan = plan.rank(self._rank)
        changes = self.batch.update(rank_plan)
        load = [self._model.take_expert_load()] if plan.report_load else []
        answer: dict[str, Any] = {"step": plan.step, "rank": self._rank, "move_us": self._move(plan.moves)}
        if not plan.num_tokens_P.any():
            self._apply(rank_plan, self._upload(*changes))
            answer |= _expert_load([counts.cpu().numpy() for counts in load])
            return Launched(
                partial(StepResult, **answer, forward_us=0, **logprobs.NO_TOKENS, **logprobs.NO_PROMPT_ROWS)
            )
        parts = micro_batches(rank_plan, self._num_micro_batches)
        step = MicroBatch.joined(parts)
        started = self._timeline.mark()
        routed = [RoutedCounts.of(self.batch.sampling, part, self._model.config, self._upload) for part in parts]
        asked = [counts for counts in routed if counts is not None]
        graph = None if asked else self._graph_for(step, plan.num_tokens_P)
        sizes = [given.num_tokens for given in (parts if graph is None else graph.inputs)]
        is_long = self.batch.sampling["is_long"]
        inputs = [part.pack(size, is_long) for part, size in zip(parts, sizes, strict=True)]
        slot_O, row_O = step.sampled(rank_plan)
        position_O, state = self.batch.num_tokens[slot_O], self.batch.sampling[slot_O]
        columns = [state[name].astype(dtype) for name, dtype in DRAW_PARAMETERS.items()]
        bent = self.batch.logit_changes(slot_O)
        limits = [] if self._thinking is None else self._thinking.limits(slot_O, self.batch.sampling)
        sampling = [*bent, *limits, row_O, self.batch.token_index(slot_O, position_O), *columns, position_O]
        uploaded = self._upload(*changes, *inputs, *sampling)
        self._apply(rank_plan, uploaded[: len(changes)])
        of_parts, of_rows = uploaded[len(changes) : -len(sampling)], uploaded[-len(sampling) :]
        if graph is not None:
            hidden_TD = graph.run(of_parts, parts)
        else:
            hidden_TD = self._forward(of_parts, parts, routed, plan.num_tokens_P.tolist())
        outputs = [
            self._prompt_logprobs(hidden_TD, step),
            self._sample(hidden_TD, slot_O, state, *_cut(of_rows, len(bent), len(limits))),
            _Output(load, _expert_load),
            *(_Output([counts.tokens], partial(_routed, counts)) for counts in asked),
        ]
        arrays = self._download([tensor for tensors, _ in outputs for tensor in tensors])
        ended = self._timeline.mark()
        finish = partial(self._finish, answer, step, outputs, arrays, started, ended)
        return Launched(finish, partial(self._timeline.is_reached, ended))

    def _apply(self, plan: RankPlan, changes: Sequence[Tensor]) -> None:
        """Update slots and blocks on the device."""
        self.batch.write(changes)
        copy_blocks(self._copies, plan, self._upload)

    def _move(self, moves: ExpertMoves | None) -> int:
        """Move experts between ranks, and return how long it took, in us."""
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
        self._timeline.synchronize()
        self._check()

    def _check(self) -> None:
        """Raise `RankStalled` if what the device has computed is void."""
        for all_to_all in self._checkable:
            all_to_all.check()

    def _finish(
        self,
        answer: dict[str, Any],
        step: MicroBatch,
        outputs: Sequence[_Output],
        arrays: Callable[[], list[np.ndarray]],
        started: Any,
        ended: Any,
    ) -> StepResult:
        elapsed_us = self._timeline.wait_us(started, ended)
        self._check()
        found = iter(arrays())
        prompt, sampled, load, *counted = [fields(list(islice(found, len(tensors)))) for tensors, fields in outputs]
        routed = np.concatenate([NOTHING, *(part["routed"] for part in counted)])
        result = StepResult(**answer, forward_us=elapsed_us, **sampled, **prompt, **load, routed=routed)
        non_finite.log(result, step, self._caches, self.batch.block_tables, self.batch.block_size)
        return result

    def _graph_for(self, step: MicroBatch, num_tokens_P: np.ndarray) -> StepGraph | None:
        """Return the first graph that fits the step beside the other ranks' tokens."""
        return next((graph for graph in self._graphs if graph.size.fits(step, self._rank, num_tokens_P)), None)

    def _forward(
        self,
        inputs: list[Tensor],
        parts: list[MicroBatch],
        routed: list[RoutedCounts | None],
        num_tokens_P: list[int],
    ) -> Tensor:
        """Return the hidden states [T, D] of the micro-batches, one after another."""
        batches: list[ForwardBatch] = []
        shares = split_tokens(num_tokens_P, len(parts))
        for words, part, share_P, counts in zip(inputs, parts, shares, routed, strict=True):
            packed = PackedInputs(words, part.num_tokens)
            batch = self.batch.forward_batch(
                packed,
                part,
                share_P,
                is_padded=self._is_padded,
                on_routed=None if counts is None else counts.add,
            )
            batches.append(batch)
        return self._model.forward(batches, self._caches)

    def _sample(
        self,
        hidden_TD: Tensor,
        slot_O: np.ndarray,
        state: np.ndarray,
        bent: Sequence[Tensor],
        limits: Sequence[Tensor],
        inputs: Sequence[Tensor],
    ) -> _Output:
        """Sample and write down the tokens, and return what the result says of them.

        Args:
            state: sampling parameters [O].
            bent: changes of logits, see `InputBatch.logit_changes`; `limits`: of reasoning, see `Thinking.limits`.
            inputs: of the rows: their place in `hidden_TD`, the index of the next token, and the columns of `Sample`.
        """
        if not len(state):
            return _Output([], lambda _: logprobs.NO_TOKENS)
        row_O, at_O, *columns = inputs
        logits_OV = self._model.logits(hidden_TD.index_select(0, row_O)).contiguous()
        is_changed = len(bent) > 0 or len(limits) > 0
        raw_OV = logits_OV.clone() if is_changed and (state["logprobs"] >= 0).any() else logits_OV
        self.batch.change_logits(logits_OV, bent, slot_O)
        if self._thinking is not None:
            self._thinking.keep_closed(logits_OV, limits)
        drawn = bool(state["temperature"].any())
        filtered = drawn and bool(((state["top_k"] > 0) | (state["top_p"] < 1)).any())
        token_O = self._ops.sample(logits_OV, Draws(*columns), drawn=drawn, filtered=filtered)
        if self._thinking is not None:
            token_O = self._thinking.control(token_O, limits)
        # The next step in flight computes a request that has just failed: it needs a token.
        known_O = token_O.clamp_min(0)
        self.batch.append(slot_O, at_O, known_O)
        are_scores = self._model.config.num_labels > 0
        picked = logprobs.of(raw_OV, known_O, state["logprobs"], self._upload, are_scores=are_scores)
        vocab = logits_OV.shape[1]
        return _Output(
            [token_O, *picked],
            lambda arrays: logprobs.token_fields(slot_O, arrays[0], arrays[1:], state["logprobs"], vocab),
        )

    def _prompt_logprobs(self, hidden_TD: Tensor, step: MicroBatch) -> _Output:
        """Return rows for every prompt token computed in this step whose successor is a prompt token too. On a GPU logits of as
        many rows at a time as `run_peak` has measured: those of a whole step may take more than all that is left."""
        rows = logprobs.prompt_rows(self.batch.sampling, step)
        if rows is None:
            return _Output([], lambda _: logprobs.NO_PROMPT_ROWS)
        rows_, slots, positions = rows
        at_row, at_token = self._upload(rows_, self.batch.token_index(slots, positions))
        tokens = self.batch.token_ids.view(-1).index_select(0, at_token).long()
        num_top, vocab = self.batch.sampling["prompt_logprobs"][slots], self._model.config.vocab_size
        widest, most = int(np.minimum(num_top, vocab).max()), self.batch.max_num_seqs
        most = most if self._ops.on_device else len(rows_)
        portions = [
            token_logprobs(self._model.logits(hidden_TD.index_select(0, some)), token, widest)
            for some, token in zip(at_row.split(most), tokens.split(most), strict=True)
        ]
        return _Output(
            [torch.cat(parts) for parts in zip(*portions, strict=True)],
            lambda arrays: logprobs.prompt_fields(slots, positions, logprobs.fields(arrays, num_top, vocab)),
        )


def _cut(tensors: Sequence[Tensor], *sizes: int) -> list[Sequence[Tensor]]:
    """Return portions of these sizes, and the rest."""
    ends = list(accumulate(sizes, initial=0))
    return [*(tensors[start:end] for start, end in pairwise(ends)), tensors[ends[-1] :]]


def _expert_load(arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
    return {"expert_load": arrays[0] if arrays else np.zeros(0, np.int64)}


def _routed(counts: RoutedCounts, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
    return {"routed": counts.entries(arrays[0])}
