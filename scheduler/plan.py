"""The contract between the controller and the ranks: caches, the plan of a step, its results.

A `StepPlan` holds every rank's slice of a step as struct of arrays: one array per field for all ranks together, sorted
by rank, and one `*_offsets` array per group of fields (length P + 1) that says where each rank's slice lies. So its cost
of packing does not grow with the number of ranks. Everything is a *delta by slot*: a rank keeps a table of slots (tokens,
block tables, sampling state) and a plan says what changes.

Shape letters: P ranks, A admitted requests, S scheduled requests, B blocks set, C blocks copied, O sampled tokens. A suffix `1`
is one more than the letter (offsets).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Literal, Self

import numpy as np

CacheKind = Literal["full", "window", "latent", "index", "state"]

# Per-slot sampling state, sent once when a request is admitted.
SAMPLING_DTYPE = np.dtype(
    [
        ("seed", np.int64),
        ("branch", np.int32),
        ("prompt_len", np.int32),  # of the client's prompt, also when a preempted request comes back with its output
        ("min_tokens", np.int32),
        ("top_k", np.int32),  # -1: all
        ("logprobs", np.int32),  # -1: none
        ("prompt_logprobs", np.int32),  # -1: none
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("repetition_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("reserved", np.int32),
    ]
)


class FinishReason(IntEnum):
    """Why a request ended; 0 is 'not yet'."""

    NONE = 0
    STOP = 1
    LENGTH = 2
    ABORT = 3


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """A cache that a model declares by name. The scheduler accounts for it in blocks and never sees a tensor.

    Args:
        name: unique within the model.
        kind: `full` paged KV; `window` paged KV of the last `window` tokens; `latent` one compressed row a token; `index`
            sparse-attention keys; `state` one slot a sequence.
        bytes_per_token: on one rank, all writing layers together (for `state`: bytes per slot).
        writers: layers that write it.
        readers: layers that read it (a layer may read another layer's cache).
        window: tokens kept, for kind `window`.
    """

    name: str
    kind: CacheKind
    bytes_per_token: int
    writers: tuple[int, ...]
    readers: tuple[int, ...]
    window: int | None = None

    def first_seen(self, num_computed: int | np.ndarray, block_size: int) -> int | np.ndarray:
        """The first block that the token behind so many computed ones sees."""
        if self.window is None:
            return 0 * num_computed
        return np.maximum(num_computed - self.window + 1, 0) // block_size


class _Arrays:
    """Named arrays in and out: scalars travel as arrays of one int64, records of SAMPLING_DTYPE as bytes."""

    scalars: ClassVar[tuple[str, ...]]
    records: ClassVar[tuple[str, ...]]

    def to_arrays(self) -> dict[str, np.ndarray]:
        out = {}
        for name, value in vars(self).items():
            if isinstance(value, int):
                value = np.array([value], np.int64)
            elif value.dtype.names:
                value = value.view(np.uint8)
            out[name] = value
        return out

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        values = dict(arrays)
        for name in cls.scalars:
            values[name] = int(values[name][0])
        for name in cls.records:
            values[name] = values[name].view(SAMPLING_DTYPE)
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """One rank's slice of a step: views into the `StepPlan`.

    Order of application: release slots, admit requests, set blocks in the slots' tables, copy blocks (all that are read before
    any that is written), then compute the scheduled tokens.
    """

    release_slot: np.ndarray  # i32
    admit_slot_A: np.ndarray  # i32
    admit_sampling_A: np.ndarray  # SAMPLING_DTYPE
    admit_tokens: list[np.ndarray]  # A x i32 [tokens known at admission]
    admit_bans: list[np.ndarray]  # A x i32: ids that cannot be sampled before min_tokens
    admit_bias_ids: list[np.ndarray]  # A x i32
    admit_bias_values: list[np.ndarray]  # A x f32
    block_slot_B: np.ndarray  # i32
    block_cache_B: np.ndarray  # i32, index into the model's cache_specs
    block_index_B: np.ndarray  # i32, position in the slot's block table
    block_id_B: np.ndarray  # i32, physical block
    copy_cache_C: np.ndarray  # i32
    copy_from_C: np.ndarray  # i32, physical block
    copy_to_C: np.ndarray  # i32, physical block
    sched_slot_S: np.ndarray  # i32
    sched_start_S: np.ndarray  # i32, tokens computed before this step
    sched_num_S: np.ndarray  # i32, tokens to compute in this step
    sched_sample_S: np.ndarray  # u8, 1: sample the next token after the last one


@dataclass(frozen=True, kw_only=True)
class StepPlan(_Arrays):
    """What every rank does in one step. Immutable; built by the scheduler, sent once per node."""

    scalars = ("epoch", "step", "report_load")
    records = ("admit_sampling_A",)

    epoch: int  # of the placement of experts
    step: int
    report_load: int  # 1: answer with the expert counts since the last report
    num_tokens_P: np.ndarray  # i32, tokens that each rank computes

    release_offsets_P1: np.ndarray
    release_slot: np.ndarray

    admit_offsets_P1: np.ndarray
    admit_slot_A: np.ndarray
    admit_sampling_A: np.ndarray
    admit_token_offsets_A1: np.ndarray
    admit_tokens: np.ndarray
    admit_ban_offsets_A1: np.ndarray
    admit_bans: np.ndarray
    admit_bias_offsets_A1: np.ndarray
    admit_bias_ids: np.ndarray
    admit_bias_values: np.ndarray

    block_offsets_P1: np.ndarray
    block_slot_B: np.ndarray
    block_cache_B: np.ndarray
    block_index_B: np.ndarray
    block_id_B: np.ndarray

    copy_offsets_P1: np.ndarray
    copy_cache_C: np.ndarray
    copy_from_C: np.ndarray
    copy_to_C: np.ndarray

    sched_offsets_P1: np.ndarray
    sched_slot_S: np.ndarray
    sched_start_S: np.ndarray
    sched_num_S: np.ndarray
    sched_sample_S: np.ndarray

    def rank(self, rank: int) -> RankPlan:
        """The slice of one rank, without copying."""
        admit = slice(self.admit_offsets_P1[rank], self.admit_offsets_P1[rank + 1])
        block = slice(self.block_offsets_P1[rank], self.block_offsets_P1[rank + 1])
        copy = slice(self.copy_offsets_P1[rank], self.copy_offsets_P1[rank + 1])
        sched = slice(self.sched_offsets_P1[rank], self.sched_offsets_P1[rank + 1])

        def ragged(values: np.ndarray, offsets: np.ndarray) -> list[np.ndarray]:
            return [values[offsets[i] : offsets[i + 1]] for i in range(admit.start, admit.stop)]

        return RankPlan(
            release_slot=self.release_slot[self.release_offsets_P1[rank] : self.release_offsets_P1[rank + 1]],
            admit_slot_A=self.admit_slot_A[admit],
            admit_sampling_A=self.admit_sampling_A[admit],
            admit_tokens=ragged(self.admit_tokens, self.admit_token_offsets_A1),
            admit_bans=ragged(self.admit_bans, self.admit_ban_offsets_A1),
            admit_bias_ids=ragged(self.admit_bias_ids, self.admit_bias_offsets_A1),
            admit_bias_values=ragged(self.admit_bias_values, self.admit_bias_offsets_A1),
            block_slot_B=self.block_slot_B[block],
            block_cache_B=self.block_cache_B[block],
            block_index_B=self.block_index_B[block],
            block_id_B=self.block_id_B[block],
            copy_cache_C=self.copy_cache_C[copy],
            copy_from_C=self.copy_from_C[copy],
            copy_to_C=self.copy_to_C[copy],
            sched_slot_S=self.sched_slot_S[sched],
            sched_start_S=self.sched_start_S[sched],
            sched_num_S=self.sched_num_S[sched],
            sched_sample_S=self.sched_sample_S[sched],
        )


@dataclass(frozen=True, kw_only=True)
class StepResult(_Arrays):
    """What one rank answers to a step.

    Log-probabilities are those of the model's raw logits, before penalties, bias and temperature. `top_*` holds, for each
    sampled token that asked for them, the most probable tokens in descending order; `prompt_*` has a row for every prompt
    token computed in this step whose successor is also a prompt token, of the slots that asked.
    """

    scalars = ("step", "rank", "forward_us")
    records = ()

    step: int
    rank: int
    forward_us: int  # wall time of the model's part of the step
    slot_O: np.ndarray  # i32
    token_O: np.ndarray  # i32
    logprob_O: np.ndarray  # f32; NaN where not asked for
    token_rank_O: np.ndarray  # i32, 1 is the most probable; 0 where not asked for
    top_offsets_O1: np.ndarray  # i32
    top_ids: np.ndarray  # i32
    top_logprobs: np.ndarray  # f32
    prompt_slot: np.ndarray  # i32
    prompt_position: np.ndarray  # i32, position of the *predicted* token
    prompt_logprob: np.ndarray  # f32
    prompt_token_rank: np.ndarray  # i32
    prompt_top_offsets: np.ndarray  # i32, one more than rows
    prompt_top_ids: np.ndarray  # i32
    prompt_top_logprobs: np.ndarray  # f32
    expert_load: np.ndarray  # i64 [layers * logical experts] since the last report, or empty
