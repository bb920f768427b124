"""The contract between the controller and the ranks, and what fronts hear of it: caches, the plan of a step, its results.

A `StepPlan` holds every rank's slice of a step as struct of arrays: one array per field for all ranks together, sorted
by rank, and one `*_offsets` array per group of fields (length P + 1) that says where each rank's slice lies. So its cost
of packing does not grow with the number of ranks. Everything is a *delta by slot*: a rank keeps a table of slots (tokens,
block tables, sampling state) and a plan says what changes.

Shape letters: P ranks, A admitted requests, S scheduled requests, B blocks set, C blocks copied, O sampled tokens; of outputs, R
prompt-log-probability rows and C counts of experts. A suffix `1` is one more than the letter (offsets).
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import ClassVar, Literal, NamedTuple, Self

import numpy as np

CacheKind = Literal["full", "window", "latent", "index", "state"]

_U8, _I32, _I64, _F32 = (np.dtype(kind) for kind in (np.uint8, np.int32, np.int64, np.float32))

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
        ("experts_from", np.int32),  # tokens from this position on have their experts counted; -1: none
    ]
)


class FinishReason(IntEnum):
    """Why a request ended; 0 is 'not yet'."""

    NONE = 0
    STOP = 1
    LENGTH = 2


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
        snapshot_every: tokens after which the state is kept, for prefixes, and goes on in another block; for kind `state`, whose
            blocks hold one state each. A multiple of the block size.
    """

    name: str
    kind: CacheKind
    bytes_per_token: int
    writers: tuple[int, ...]
    readers: tuple[int, ...]
    window: int | None = None
    snapshot_every: int | None = None

    @property
    def num_seen(self) -> int | None:
        """Tokens of it that a token needs, itself included; None: all. Of a state, that is the one after the token before."""
        return 2 if self.kind == "state" else self.window

    def tokens_per_block(self, block_size: int) -> int:
        """`block_size`, but for a state."""
        return self.snapshot_every or block_size

    def most_blocks(self, block_size: int, max_model_len: int, max_num_batched_tokens: int) -> int:
        """That one request can hold: those of the longest, or of its window and one step's tokens."""
        size, seen = self.tokens_per_block(block_size), self.num_seen
        longest = -(-max_model_len // size)
        return longest if seen is None else min(longest, -(-(seen + max_num_batched_tokens) // size) + 1)


class _Message:
    """Scalars and arrays that travel as one array of words, named like the class: there is little to make and unmake.

        i64 [1 + scalars + arrays]   digest of the fields' names and types | scalars | each array's length in words
        i32 [sum of the lengths]     the arrays, one after another; bytes travel as words

    Attributes:
        scalars: the fields that are ints; they come first.
        dtypes: of the other fields, which are contiguous arrays; i32 unless `others` says otherwise.
    """

    scalars: ClassVar[tuple[str, ...]]
    dtypes: ClassVar[dict[str, np.dtype]]
    _bytes: ClassVar[list[int]]  # indices among the arrays
    _others: ClassVar[list[tuple[int, np.dtype]]]  # likewise, of those that are neither bytes nor words
    _nothing: ClassVar[list[np.ndarray]]  # empty arrays, shared: most are
    _travelling: ClassVar[list[np.dtype]]
    _head: ClassVar[struct.Struct]
    _digest: ClassVar[int]

    def __init_subclass__(cls, *, others: dict[str, np.dtype]) -> None:
        types = cls.__annotations__
        cls.scalars = tuple(name for name in types if types[name] == "int")
        cls.dtypes = {name: others.get(name, _I32) for name in types if name not in cls.scalars}
        assert [*types] == [*cls.scalars, *cls.dtypes], f"{cls.__name__}: scalars come first"
        dtypes = list(cls.dtypes.values())
        cls._bytes = [index for index, dtype in enumerate(dtypes) if dtype.itemsize == 1]
        cls._others = [(index, dtype) for index, dtype in enumerate(dtypes) if dtype.itemsize > 1 and dtype != _I32]
        cls._nothing = [np.zeros(0, dtype) for dtype in dtypes]
        cls._travelling = [dtype if dtype.itemsize > 1 else _I32 for dtype in dtypes]
        cls._head = struct.Struct(f"<{1 + len(cls.scalars)}q{len(dtypes)}Q")
        cls._digest = zlib.crc32(str([*types, *(dtype.descr for dtype in dtypes)]).encode())

    def to_arrays(self) -> dict[str, np.ndarray]:
        """What the control channel carries."""
        values = list(vars(self).values())
        scalars, arrays = values[: len(self.scalars)], values[len(self.scalars) :]
        for index in self._bytes:
            arrays[index] = arrays[index].astype(_I32)
        found = [array.dtype for array in arrays]
        assert found == self._travelling, f"{type(self).__name__} has {dict(zip(self.dtypes, found, strict=True))}"
        head = self._head.pack(self._digest, *scalars, *[array.nbytes // _I32.itemsize for array in arrays])
        return {type(self).__name__: np.frombuffer(b"".join((head, *arrays)), _I32)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """The message, as views of what arrived.

        Raises:
            ValueError: it is another message, of another version, or damaged.
        """
        words = arrays.get(cls.__name__)
        if words is None or words.dtype != _I32 or words.ndim != 1 or words.nbytes < cls._head.size:
            found = {name: f"{array.dtype}{list(array.shape)}" for name, array in arrays.items()}
            raise ValueError(f"expected a {cls.__name__}, got {found}")
        digest, *values = cls._head.unpack_from(words)
        if digest != cls._digest:
            raise ValueError(f"a {cls.__name__} of another version: its fields' digest is {digest}, ours {cls._digest}")
        lengths = values[len(cls.scalars) :]
        bounds = [*itertools.accumulate(lengths, initial=cls._head.size // _I32.itemsize)]
        parts = zip(bounds, bounds[1:], cls._nothing, strict=False)
        fields = [words[begin:end] if begin < end else nothing for begin, end, nothing in parts]
        try:
            if bounds[-1] != len(words):
                raise ValueError(f"that would be {bounds[-1]}")
            for index, dtype in cls._others:
                if lengths[index]:
                    fields[index] = fields[index].view(dtype)
        except ValueError as error:
            what = f"malformed {cls.__name__} of {len(words)} words with arrays of {lengths}"
            raise ValueError(f"{what}: {error}") from error
        for index in cls._bytes:
            fields[index] = fields[index].astype(_U8)
        message = object.__new__(cls)
        vars(message).update(zip(cls.scalars, values, strict=False))
        vars(message).update(zip(cls.dtypes, fields, strict=True))
        return message


class RankPlan(NamedTuple):
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


class ExpertMoves(NamedTuple):
    """Experts that move before a step's tokens are computed, of one layer."""

    layer: int
    source_M: np.ndarray  # i32, physical experts to copy from
    target_M: np.ndarray  # i32, physical experts to copy for
    logical_S: np.ndarray  # i32, the logical expert of each physical one, from this step on; empty: not yet
    turns_S: np.ndarray  # i32, likewise, each one's share of its expert's rows, in turns


def _no_words() -> np.ndarray:
    return np.zeros(0, np.int32)


@dataclass(frozen=True, kw_only=True)
class StepPlan(_Message, others={"admit_sampling_A": SAMPLING_DTYPE, "admit_bias_values": _F32, "sched_sample_S": _U8}):
    """What every rank does in one step. Immutable; built by the scheduler, sent once per node."""

    epoch: int  # of the placement of experts
    step: int
    report_load: int  # 1: answer with the expert counts since the last report, before this step
    move_layer: int = -1  # whose experts move, as `ExpertMoves` says; -1: none
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

    move_source_M: np.ndarray = field(default_factory=_no_words)
    move_target_M: np.ndarray = field(default_factory=_no_words)
    move_logical_S: np.ndarray = field(default_factory=_no_words)
    move_turns_S: np.ndarray = field(default_factory=_no_words)

    def moving(self, moves: ExpertMoves) -> StepPlan:
        """The same step, before whose tokens experts move."""
        return replace(
            self,
            move_layer=moves.layer,
            move_source_M=moves.source_M,
            move_target_M=moves.target_M,
            move_logical_S=moves.logical_S,
            move_turns_S=moves.turns_S,
        )

    @property
    def moves(self) -> ExpertMoves | None:
        """What `moving` has added."""
        if self.move_layer < 0:
            return None
        slots = self.move_source_M, self.move_target_M
        return ExpertMoves(self.move_layer, *slots, self.move_logical_S, self.move_turns_S)

    def rank(self, rank: int) -> RankPlan:
        """The slice of one rank, without copying."""

        def part(offsets_P1: np.ndarray) -> slice:
            return slice(offsets_P1.item(rank), offsets_P1.item(rank + 1))

        admit, block = part(self.admit_offsets_P1), part(self.block_offsets_P1)
        copy, sched = part(self.copy_offsets_P1), part(self.sched_offsets_P1)

        def ragged(values: np.ndarray, offsets: np.ndarray) -> list[np.ndarray]:
            return [values[offsets[i] : offsets[i + 1]] for i in range(admit.start, admit.stop)]

        return RankPlan(
            release_slot=self.release_slot[part(self.release_offsets_P1)],
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
class StepResult(
    _Message,
    others={"expert_load": _I64}
    | dict.fromkeys(("logprob_O", "top_logprobs", "prompt_logprob", "prompt_top_logprobs"), _F32),
):
    """What one rank answers to a step.

    Log-probabilities are those of the model's raw logits, before penalties, bias and temperature. `top_*` holds, for each
    sampled token that asked for them, the most probable tokens in descending order; `prompt_*` has a row for every prompt
    token computed in this step whose successor is also a prompt token, of the slots that asked. `routed` says how many of a
    slot's tokens in this step went to an expert, where any did, of the slots that asked; an expert may be there twice.
    """

    step: int
    rank: int
    forward_us: int  # wall time of the model's part of the step
    move_us: int = 0  # of moving experts before it
    expert_load: np.ndarray  # i64 [layers * logical experts] since the last report, or empty
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
    routed: np.ndarray = field(default_factory=_no_words)  # i32 [3 * n]: slot, layer * logical experts + expert, tokens


@dataclass(frozen=True, kw_only=True)
class StepOutputs:
    """Sampled tokens and prompt log-probabilities of one step by request key, sorted by rank.

    Fields as in `StepResult`. A request's last output has `finish_O` set. Prompt log-probabilities come with the step that
    computed them: before the request's first token, and once more after it has been preempted. What a front is sent are its own
    requests', under the ids that it gave them.
    """

    step: int
    key_O: np.ndarray  # i64
    token_O: np.ndarray  # i32
    finish_O: np.ndarray  # u8, FinishReason
    num_cached_O: np.ndarray  # i32, prompt tokens that the prefix cache had when the request was first admitted
    logprob_O: np.ndarray  # f32
    token_rank_O: np.ndarray  # i32
    top_offsets_O1: np.ndarray  # i32
    top_ids: np.ndarray  # i32
    top_logprobs: np.ndarray  # f32
    prompt_key_R: np.ndarray  # i64
    prompt_position_R: np.ndarray  # i32
    prompt_logprob_R: np.ndarray  # f32
    prompt_token_rank_R: np.ndarray  # i32
    prompt_top_offsets_R1: np.ndarray  # i32
    prompt_top_ids: np.ndarray  # i32
    prompt_top_logprobs: np.ndarray  # f32
    routed_key_C: np.ndarray  # i64
    routed_expert_C: np.ndarray  # i32, layer * logical experts + expert; of one request it may be there twice
    routed_tokens_C: np.ndarray  # i32


@dataclass(frozen=True)
class Rejection:
    """The answer to a request that is not accepted.

    Args:
        key: of the request.
        code: name of a gRPC status. INVALID_ARGUMENT: never possible; RESOURCE_EXHAUSTED: try again later.
        message: names the field, its value and what is allowed.
        retry_after_s: RESOURCE_EXHAUSTED: when to try again, in seconds; None if nothing is known.
    """

    key: int
    code: str
    message: str
    retry_after_s: float | None = None
