"""Outputs of a step: the ranks' results gathered and addressed to requests.

Letters as in `plan`, and I prompt tokens whose log-probabilities are reported, Z slots of all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from operator import attrgetter
from typing import TYPE_CHECKING

import numpy as np

from expertwire.scheduler.plan import F32, I32, I64, U8, StepResult, joined_counts, pack_lists, to_offsets

if TYPE_CHECKING:  # clients of the outputs need no compiled code
    from expertwire.scheduler._compiled.steps import StepSchedule
    from expertwire.scheduler.running import RunningBatch


class FinishReason(IntEnum):
    """Why a request ended; NONE: it runs on; PAUSED: it has not ended, and samples nothing until it is resumed."""

    NONE = 0
    STOP = 1
    LENGTH = 2
    PAUSED = 3


@dataclass(frozen=True, kw_only=True)
class StepOutputs:
    """Sampled tokens and prompt log-probabilities of one step by request key, sorted by rank.

    Fields as in `StepResult`. A request's last output has `finish_O` set; one after which it is paused has PAUSED.
    Prompt log-probabilities come with the step that computed them: before the request's first token, and once
    more after a preemption. A front gets the outputs of its own requests, under its own ids.

    `failed_keys` names requests that have ended because their logits are not finite, in the row for
    the token at `failed_positions`; they have no other output in this step.
    """

    step: int
    key_O: I64
    token_O: I32
    finish_O: U8  # FinishReason
    num_cached_O: I32  # prompt tokens found in the prefix cache when the request was first admitted
    logprob_O: F32
    token_rank_O: I32
    top_offsets_O1: I32
    top_ids: I32
    top_logprobs: F32
    prompt_key_I: I64
    prompt_position_I: I32
    prompt_logprob_I: F32
    prompt_token_rank_I: I32
    prompt_top_offsets_I1: I32
    prompt_top_ids: I32
    prompt_top_logprobs: F32
    routed_keys: I64
    routed_experts: I32  # layer * E + expert; of one request it may occur twice
    routed_tokens: I32
    failed_keys: I64
    failed_positions: I32
    failed_ranks: I32

    def select(self, sampled: np.ndarray, prompts: np.ndarray, routed: np.ndarray, failed: np.ndarray) -> StepOutputs:
        """Return the outputs with these rows of each kind, by ascending indices: of `key_O`, `prompt_key_I`, `routed_keys` and
        `failed_keys`."""
        values = dict(vars(self))
        for name, value in vars(self).items():
            if name.endswith("_O"):
                values[name] = value[sampled]
            elif name.endswith("_I"):
                values[name] = value[prompts]
            elif name.startswith("routed_"):
                values[name] = value[routed]
            elif name.startswith("failed_"):
                values[name] = value[failed]
        values |= self._take(sampled, "top_offsets_O1", ("top_ids", "top_logprobs"))
        values |= self._take(prompts, "prompt_top_offsets_I1", ("prompt_top_ids", "prompt_top_logprobs"))
        return StepOutputs(**values)

    def split(self, kept_O: np.ndarray) -> tuple[StepOutputs, StepOutputs]:
        """Return the outputs without some sampled tokens, and these tokens alone. `kept_O`: bool."""
        every = [np.arange(len(rows)) for rows in (self.prompt_key_I, self.routed_keys, self.failed_keys)]
        nothing = np.zeros(0, np.int64)
        rest = self.select(np.flatnonzero(~kept_O), *every)
        return rest, self.select(np.flatnonzero(kept_O), nothing, nothing, nothing)

    def _take(self, rows: np.ndarray, offsets: str, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Return some rows of ragged arrays, with their offsets."""
        bounds = getattr(self, offsets)
        starts, counts = bounds[:-1][rows], np.diff(bounds)[rows]
        new_offsets = to_offsets(counts)
        index = np.arange(new_offsets[-1]) + np.repeat(starts - new_offsets[:-1], counts)
        return {offsets: new_offsets, **{name: getattr(self, name)[index] for name in names}}


@dataclass(frozen=True)
class Rejection:
    """The answer to a request that is not accepted.

    Args:
        key: of the request, and of the first branch of a group.
        code: name of a gRPC status. INVALID_ARGUMENT: never possible; RESOURCE_EXHAUSTED: try again later.
        message: names the field, its value and what is allowed.
        retry_after_s: RESOURCE_EXHAUSTED: seconds to wait before trying again; None if nothing is known.
    """

    key: int
    code: str
    message: str
    retry_after_s: float | None = None


def gather(
    step: StepSchedule,
    results: Sequence[StepResult],
    batch: RunningBatch,
    eos_ids: np.ndarray,
    special_V: np.ndarray,
) -> tuple[np.ndarray, StepOutputs]:
    """Append the sampled tokens of all ranks to the batch, and gather the outputs of running requests.

    Returns:
        i32 [O], the outputs' rows of the batch; and the outputs, whose `finish_O` may be
        `CHECK_IDS` or `SUSPENDED`, see `RunningBatch.append_sampled`.
    """
    slot_O, offsets_P1 = pack_lists([result.slot_O for result in results], np.int32)
    sampled = slot_O, *(_joined(results, name) for name in ("token_O", "logprob_O", "token_rank_O"))
    accepted, runs_Z = batch.append_sampled(results[0].step, step, offsets_P1, sampled, eos_ids, special_V)
    failed_rows, failed = _failed(results, sampled[1], runs_Z, batch)
    if len(failed_rows):
        runs_Z[failed_rows] = 0
        kept_O = runs_Z[accepted.row_O] != 0
        accepted = type(accepted)(*(column[kept_O] for column in accepted))
    top_offsets_O1, top_ids, top_logprobs = _tops(results, "top_offsets_O1", "top_ids", "top_logprobs", accepted.at_O)
    return accepted.row_O, StepOutputs(
        step=results[0].step,
        key_O=accepted.key_O,
        token_O=accepted.token_O,
        finish_O=accepted.finish_O,
        num_cached_O=accepted.num_cached_O,
        logprob_O=accepted.logprob_O,
        token_rank_O=accepted.token_rank_O,
        top_offsets_O1=top_offsets_O1,
        top_ids=top_ids,
        top_logprobs=top_logprobs,
        **_prompt_logprobs(results, runs_Z, batch),
        **_routed(results, runs_Z, batch),
        **failed,
    )


def _failed(
    results: Sequence[StepResult], token_O: np.ndarray, runs_Z: np.ndarray, batch: RunningBatch
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the rows of running requests whose logits are not finite, once each, and the fields about them."""
    rows, positions = [], []
    if _any_of(results, "prompt_slot") and (wrong := np.isnan(_joined(results, "prompt_logprob"))).any():
        rows.append(batch.rows_of([result.prompt_slot for result in results])[wrong])
        positions.append(_joined(results, "prompt_position")[wrong])
    if (wrong := token_O < 0).any():
        rows.append(batch.rows_of([result.slot_O for result in results])[wrong])
        positions.append(batch.num_known_Z[rows[-1]])
    if not rows:
        return _NO_ROWS, _NONE_FAILED
    failed_rows, first = np.unique(np.concatenate(rows), return_index=True)  # the first position of each
    runs = runs_Z[failed_rows] != 0
    failed_rows, position = failed_rows[runs], np.concatenate(positions)[first[runs]]
    return failed_rows, _failed_fields(batch.key_Z[failed_rows], position, batch.rank_Z[failed_rows])


def _failed_fields(keys: np.ndarray, positions: np.ndarray, ranks: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "failed_keys": keys,
        "failed_positions": positions.astype(np.int32),
        "failed_ranks": ranks.astype(np.int32),
    }


_NO_ROWS = np.zeros(0, np.int64)
_NONE_FAILED = _failed_fields(_NO_ROWS, _NO_ROWS, _NO_ROWS)


def _prompt_logprobs(results: Sequence[StepResult], runs_Z: np.ndarray, batch: RunningBatch) -> dict[str, np.ndarray]:
    if _any_of(results, "prompt_slot"):
        row_I = batch.rows_of([result.prompt_slot for result in results])
    else:  # one rank's empty fields will do
        row_I, results = np.zeros(0, np.int64), results[:1]
    keep_I = np.flatnonzero(runs_Z[row_I])
    top_offsets_I1, top_ids, top_logprobs = _tops(
        results, "prompt_top_offsets", "prompt_top_ids", "prompt_top_logprobs", keep_I
    )
    return {
        "prompt_key_I": batch.key_Z[row_I[keep_I]],
        "prompt_position_I": _joined(results, "prompt_position")[keep_I],
        "prompt_logprob_I": _joined(results, "prompt_logprob")[keep_I],
        "prompt_token_rank_I": _joined(results, "prompt_token_rank")[keep_I],
        "prompt_top_offsets_I1": top_offsets_I1,
        "prompt_top_ids": top_ids,
        "prompt_top_logprobs": top_logprobs,
    }


def _routed(results: Sequence[StepResult], runs_Z: np.ndarray, batch: RunningBatch) -> dict[str, np.ndarray]:
    if not _any_of(results, "routed"):
        empty = results[0].routed
        return {"routed_keys": empty.astype(np.int64), "routed_experts": empty, "routed_tokens": empty}
    parts = [result.routed.reshape(-1, 3) for result in results]
    rows = batch.rows_of([part[:, 0] for part in parts])
    kept = np.flatnonzero(runs_Z[rows])
    _, experts, tokens = np.concatenate(parts)[kept].T.copy()
    return {"routed_keys": batch.key_Z[rows[kept]], "routed_experts": experts, "routed_tokens": tokens}


def _any_of(results: Sequence[StepResult], name: str) -> bool:
    return any(map(len, map(attrgetter(name), results)))


def _joined(results: Sequence[StepResult], name: str) -> np.ndarray:
    if len(results) == 1:
        return getattr(results[0], name)
    return np.concatenate([*map(attrgetter(name), results)])


def _tops(
    results: Sequence[StepResult], offsets: str, ids: str, logprobs: str, keep: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return these three fields of the rows `keep`, ascending; fast if no request asked for any."""
    if not _any_of(results, ids):
        first = results[0]
        return np.zeros(len(keep) + 1, np.int32), getattr(first, ids), getattr(first, logprobs)
    all_ids, all_logprobs = _joined(results, ids), _joined(results, logprobs)
    counts = joined_counts([getattr(result, offsets) for result in results])
    kept = np.repeat(np.isin(np.arange(len(counts)), keep), counts)
    return to_offsets(counts[keep]), all_ids[kept], all_logprobs[kept]
