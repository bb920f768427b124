"""Messages between the controller and the ranks: the plan of a step and a rank's result.

A `StepPlan` holds every rank's slice of a step as struct of arrays: one array a field for all ranks
together, sorted by rank, and one `*_offsets_P1` array for each group of fields with where each
rank's slice begins. So packing costs the same for any number of ranks. Everything is a *delta by
slot*: a rank keeps a table of slots (tokens, block tables, sampling state), and a plan says what
changes.

To add a field, declare it in the message with one of the array types below; the layout follows from
the declaration.

P ranks, A admitted requests, S scheduled requests, B blocks added to block tables, M blocks copied
or experts moved, X physical experts, O sampled tokens. The suffix `1` is one more than the letter
(offsets).
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from expertwire.scheduler.sampling_params import SAMPLING_DTYPE

U8: TypeAlias = NDArray[np.uint8]
I32: TypeAlias = NDArray[np.int32]
I64: TypeAlias = NDArray[np.int64]
F32: TypeAlias = NDArray[np.float32]
SamplingRecords: TypeAlias = np.ndarray  # of SAMPLING_DTYPE

_WORD = np.dtype(np.int32)
_DTYPES = {
    name: np.dtype(kind) for name, kind in (("U8", np.uint8), ("I32", np.int32), ("I64", np.int64), ("F32", np.float32))
} | {"SamplingRecords": SAMPLING_DTYPE}


class _Message:
    """A message of integers and arrays, sent as one array of words under the name of its class.

        i64 [1 + scalars + arrays]   digest of the fields' names and types | scalars | each array's length in words
        i32 [sum of the lengths]     the arrays, one after another; bytes are sent as words

    Attributes:
        scalars: the fields that are ints; they come first.
        dtypes: of the other fields, which are contiguous arrays.
    """

    scalars: ClassVar[tuple[str, ...]]
    dtypes: ClassVar[dict[str, np.dtype]]
    _bytes: ClassVar[list[int]]  # indices of the arrays of bytes
    _others: ClassVar[list[tuple[int, np.dtype]]]  # indices and dtypes of the arrays of neither bytes nor words
    _empty: ClassVar[list[np.ndarray]]  # shared empty arrays, as most arrays are
    _sent: ClassVar[list[np.dtype]]
    _head: ClassVar[struct.Struct]
    _digest: ClassVar[int]

    def __init_subclass__(cls) -> None:
        types = cls.__annotations__
        cls.scalars = tuple(name for name in types if types[name] == "int")
        cls.dtypes = {name: _DTYPES[types[name]] for name in types if name not in cls.scalars}
        assert [*types] == [*cls.scalars, *cls.dtypes], f"{cls.__name__}: scalars come first"
        dtypes = list(cls.dtypes.values())
        cls._bytes = [index for index, dtype in enumerate(dtypes) if dtype.itemsize == 1]
        cls._others = [(index, dtype) for index, dtype in enumerate(dtypes) if dtype.itemsize > 1 and dtype != _WORD]
        cls._empty = [np.zeros(0, dtype) for dtype in dtypes]
        cls._sent = [dtype if dtype.itemsize > 1 else _WORD for dtype in dtypes]
        cls._head = struct.Struct(f"<{1 + len(cls.scalars)}q{len(dtypes)}Q")
        cls._digest = zlib.crc32(str([*types, *(dtype.descr for dtype in dtypes)]).encode())

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the message as the control channel carries it."""
        values = list(vars(self).values())
        scalars, arrays = values[: len(self.scalars)], values[len(self.scalars) :]
        for index in self._bytes:
            arrays[index] = arrays[index].astype(_WORD)
        found = [array.dtype for array in arrays]
        assert found == self._sent, f"{type(self).__name__} has {dict(zip(self.dtypes, found, strict=True))}"
        head = self._head.pack(self._digest, *scalars, *[array.nbytes // _WORD.itemsize for array in arrays])
        return {type(self).__name__: np.frombuffer(b"".join((head, *arrays)), _WORD)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """Return the message, as views of what arrived.

        Raises:
            ValueError: it is another message, of another version, or damaged.
        """
        words = arrays.get(cls.__name__)
        if words is None or words.dtype != _WORD or words.ndim != 1 or words.nbytes < cls._head.size:
            found = {name: f"{array.dtype}{list(array.shape)}" for name, array in arrays.items()}
            raise ValueError(f"expected a {cls.__name__}, got {found}")
        digest, *values = cls._head.unpack_from(words.data)
        if digest != cls._digest:
            raise ValueError(f"a {cls.__name__} of another version: its fields' digest is {digest}, ours {cls._digest}")
        lengths = values[len(cls.scalars) :]
        bounds = [*itertools.accumulate(lengths, initial=cls._head.size // _WORD.itemsize)]
        parts = zip(bounds, bounds[1:], cls._empty, strict=False)
        fields = [words[begin:end] if begin < end else empty for begin, end, empty in parts]
        try:
            if bounds[-1] != len(words):
                raise ValueError(f"that would be {bounds[-1]}")
            for index, dtype in cls._others:
                if lengths[index]:
                    fields[index] = fields[index].view(dtype)
        except ValueError as error:
            prefix = f"malformed {cls.__name__} of {len(words)} words with arrays of {lengths}"
            raise ValueError(f"{prefix}: {error}") from error
        for index in cls._bytes:
            fields[index] = fields[index].astype(np.uint8)
        message = object.__new__(cls)
        vars(message).update(zip(cls.scalars, values, strict=False))
        vars(message).update(zip(cls.dtypes, fields, strict=True))
        return message


class RankPlan(NamedTuple):
    """One rank's slice of a step: views into the `StepPlan`.

    Order of application: release slots, admit requests, set blocks in the slots' block tables (first
    those of leaders, whose tables their followers start with), copy blocks (all reads before any
    write), then compute the scheduled tokens.
    """

    release_slot: I32
    admit_slot_A: I32
    admit_source_A: I32  # the slot whose tokens and block tables it starts with: its own, or its leader's
    admit_sampling_A: SamplingRecords
    admit_tokens: list[I32]  # of each admitted request, the tokens known at admission; none where they are its leader's
    admit_bans: list[I32]  # ids that cannot be sampled before min_tokens
    admit_bias_ids: list[I32]
    admit_bias_values: list[F32]
    block_slot_B: I32
    block_cache_B: I32  # index into the model's cache_specs
    block_index_B: I32  # position in the slot's block table
    block_id_B: I32
    copy_cache_M: I32
    copy_from_M: I32  # block ids
    copy_to_M: I32  # block ids
    sched_slot_S: I32
    sched_start_S: I32  # tokens computed before this step
    sched_num_S: I32  # tokens to compute in this step
    sched_sample_S: U8  # 1: sample the next token after the last one
    sched_source_S: I32  # the slot whose last hidden states it samples from: its own, or where num is 0 another one


# The offsets of a `RankPlan`'s fields: by their first word, and for lists, of each request's items.
_OFFSETS = {name: name.partition("_")[0] for name in RankPlan._fields}
_ITEM_OFFSETS = {
    "admit_tokens": "admit_token_offsets_A1",
    "admit_bans": "admit_ban_offsets_A1",
    "admit_bias_ids": "admit_bias_offsets_A1",
    "admit_bias_values": "admit_bias_offsets_A1",
}


class ExpertMoves(NamedTuple):
    """Experts of one layer that move before a step's tokens are computed."""

    layer: int
    source_M: I32  # physical experts to copy from
    target_M: I32  # physical experts to copy to
    logical_X: I32  # the logical expert of each physical one from this step on; empty: unchanged
    turns_X: I32  # each physical expert's share of its logical expert's rows, in turns; empty: unchanged


def _empty() -> np.ndarray:
    return np.zeros(0, np.int32)


@dataclass(frozen=True, kw_only=True)
class StepPlan(_Message):
    """One step of all ranks. Immutable; built by the scheduler, sent once to each node. Fields as in `RankPlan`."""

    epoch: int  # of the placement of experts
    step: int
    report_load: int  # 1: answer with the expert counts since the last report, before this step
    move_layer: int = -1  # the layer of `ExpertMoves`; -1: none
    num_tokens_P: I32  # tokens that each rank computes

    release_offsets_P1: I32
    release_slot: I32

    admit_offsets_P1: I32
    admit_slot_A: I32
    admit_source_A: I32
    admit_sampling_A: SamplingRecords
    admit_token_offsets_A1: I32
    admit_tokens: I32
    admit_ban_offsets_A1: I32
    admit_bans: I32
    admit_bias_offsets_A1: I32
    admit_bias_ids: I32
    admit_bias_values: F32

    block_offsets_P1: I32
    block_slot_B: I32
    block_cache_B: I32
    block_index_B: I32
    block_id_B: I32

    copy_offsets_P1: I32
    copy_cache_M: I32
    copy_from_M: I32
    copy_to_M: I32

    sched_offsets_P1: I32
    sched_slot_S: I32
    sched_start_S: I32
    sched_num_S: I32
    sched_sample_S: U8
    sched_source_S: I32

    move_source_M: I32 = field(default_factory=_empty)
    move_target_M: I32 = field(default_factory=_empty)
    move_logical_X: I32 = field(default_factory=_empty)
    move_turns_X: I32 = field(default_factory=_empty)

    def with_moves(self, moves: ExpertMoves) -> StepPlan:
        """Return the same step with these moves of experts before it."""
        return replace(self, **{f"move_{name}": value for name, value in moves._asdict().items()})

    @property
    def moves(self) -> ExpertMoves | None:
        """The moves of experts before the step."""
        if self.move_layer < 0:
            return None
        return ExpertMoves(
            self.move_layer, self.move_source_M, self.move_target_M, self.move_logical_X, self.move_turns_X
        )

    def rank(self, rank: int) -> RankPlan:
        """Return the slice of one rank, without copying."""
        values = vars(self)
        parts = {}
        for group in ("release", "admit", "block", "copy", "sched"):
            offsets_P1 = values[f"{group}_offsets_P1"]
            parts[group] = slice(offsets_P1.item(rank), offsets_P1.item(rank + 1))
        fields = {name: values[name][parts[group]] for name, group in _OFFSETS.items() if name not in _ITEM_OFFSETS}
        for name, offsets in _ITEM_OFFSETS.items():
            bounds = values[offsets][parts["admit"].start : parts["admit"].stop + 1].tolist()
            fields[name] = [values[name][begin:end] for begin, end in itertools.pairwise(bounds)]
        return RankPlan(**fields)


@dataclass(frozen=True, kw_only=True)
class StepResult(_Message):
    """One rank's result of a step.

    Log-probabilities are those of the model's raw logits, before penalties, bias and temperature.
    `top_*` holds, for each sampled token that asked for them, the most probable tokens in
    descending order; `prompt_*` has a row for every prompt token computed in this step whose
    successor is also a prompt token, of the slots that asked. `routed` counts a slot's tokens in
    this step by expert, where not 0, of the slots that asked; an expert may occur twice.
    """

    step: int
    rank: int
    forward_us: int  # wall time of the model's part of the step
    move_us: int = 0  # of moving experts before it
    expert_load: I64 = field(
        default_factory=lambda: np.zeros(0, np.int64)
    )  # [layers * E] since the last report, or empty
    slot_O: I32
    token_O: I32  # -1: the logits are not finite
    logprob_O: F32  # NaN where not asked for
    token_rank_O: I32  # 1 is the most probable; 0 where not asked for
    top_offsets_O1: I32
    top_ids: I32
    top_logprobs: F32
    prompt_slot: I32
    prompt_position: I32  # of the *predicted* token
    prompt_logprob: F32  # NaN: the logits are not finite
    prompt_token_rank: I32
    prompt_top_offsets: I32  # one more than rows
    prompt_top_ids: I32
    prompt_top_logprobs: F32
    routed: I32 = field(default_factory=_empty)  # [3 * n]: slot, layer * E + expert, tokens

    @classmethod
    def sampled(cls, *, step: int, rank: int, slot_O: I32, token_O: I32) -> StepResult:
        """Return a result of nothing but sampled tokens."""
        count, ints, floats = len(slot_O), np.zeros(0, np.int32), np.zeros(0, np.float32)
        return cls(
            step=step,
            rank=rank,
            forward_us=0,
            slot_O=slot_O,
            token_O=token_O,
            logprob_O=np.full(count, np.nan, np.float32),
            token_rank_O=np.zeros(count, np.int32),
            top_offsets_O1=np.zeros(count + 1, np.int32),
            top_ids=ints,
            top_logprobs=floats,
            prompt_slot=ints,
            prompt_position=ints,
            prompt_logprob=floats,
            prompt_token_rank=ints,
            prompt_top_offsets=np.zeros(1, np.int32),
            prompt_top_ids=ints,
            prompt_top_logprobs=floats,
        )


# ---- lists of different lengths as flat arrays and offsets: A lists, B items


def to_offsets(counts_A: np.ndarray) -> I32:
    """Return the offsets of lists with so many items: i32 [A + 1]."""
    offsets_A1 = np.zeros(len(counts_A) + 1, np.int32)
    counts_A.cumsum(out=offsets_A1[1:])
    return offsets_A1


def positions_in_lists(counts_A: np.ndarray) -> I64:
    """Return each item's position within its list, i64 [B]: counts (2, 0, 3) give 0 1 0 1 2."""
    ends_A = counts_A.cumsum()
    return np.arange(ends_A[-1] if len(ends_A) else 0) - (ends_A - counts_A).repeat(counts_A)


def pack_lists(lists: Sequence[Sequence[float] | np.ndarray], dtype: type) -> tuple[np.ndarray, I32]:
    """Return the lists' items one after another, as `dtype`, and their offsets."""
    if not any(map(len, lists)):
        return np.zeros(0, dtype), np.zeros(len(lists) + 1, np.int32)
    counts_A = np.fromiter(map(len, lists), np.int64, len(lists))
    offsets_A1 = to_offsets(counts_A)
    return np.concatenate(
        lists if counts_A.all() else [items for items in lists if len(items)], dtype=dtype
    ), offsets_A1


def joined_counts(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return the lists' item counts of several offset arrays: `np.diff` of each, joined."""
    ends = np.cumsum([len(part) for part in parts])
    return np.delete(np.diff(np.concatenate(parts)), ends[:-1] - 1)
