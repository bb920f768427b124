"""What a step's results say about requests: `StepOutputs`, gathered from all ranks' `StepResult`s.

Shape letters: O sampled tokens, R prompt-log-probability rows, N rows of the running table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from expertwire.scheduler import ragged
from expertwire.scheduler.plan import StepResult
from expertwire.scheduler.table import RunningTable


@dataclass(frozen=True, kw_only=True)
class StepOutputs:
    """Sampled tokens and prompt log-probabilities of one step by request key, sorted by rank.

    Fields as in `StepResult`. A request's last output has `finish_O` set. Prompt log-probabilities come with the step that
    computed them: before the request's first token, and once more after it has been preempted.
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


def gather(
    step: int,
    results: Sequence[StepResult],
    rows_O: np.ndarray,
    going_N: np.ndarray,
    table: RunningTable,
) -> tuple[np.ndarray, StepOutputs]:
    """Join the ranks' results (of all ranks, in their order), without the rows of requests that are gone.

    Args:
        rows_O: i64, rows of the table of the sampled tokens.
        going_N: whether the row's request is still the one that the step was planned for, and running.

    Returns:
        `rows_O` of the tokens that are left, and the outputs, whose finish reasons are still to be filled in.
    """
    keep_O = np.flatnonzero(going_N[rows_O])  # quicker than a mask, for several arrays
    rows_O = rows_O[keep_O]
    top_offsets_O1, top_ids, top_logprobs = _tops(results, "top_offsets_O1", "top_ids", "top_logprobs", keep_O)
    return rows_O, StepOutputs(
        step=step,
        key_O=table.key_N[rows_O],
        token_O=_joined(results, "token_O")[keep_O],
        finish_O=np.zeros(len(rows_O), np.uint8),
        num_cached_O=table.num_cached_N[rows_O],
        logprob_O=_joined(results, "logprob_O")[keep_O],
        token_rank_O=_joined(results, "token_rank_O")[keep_O],
        top_offsets_O1=top_offsets_O1,
        top_ids=top_ids,
        top_logprobs=top_logprobs,
        **_prompt_logprobs(results, going_N, table),
    )


def _prompt_logprobs(results: Sequence[StepResult], going_N: np.ndarray, table: RunningTable) -> dict[str, np.ndarray]:
    """The fields about prompts."""
    if any(len(result.prompt_slot) for result in results):
        rows_R = table.rows_of_parts([result.prompt_slot for result in results])
    else:  # one rank's empty fields are as good as all ranks'
        rows_R, results = np.zeros(0, np.int64), results[:1]
    keep_R = np.flatnonzero(going_N[rows_R])
    top_offsets_R1, top_ids, top_logprobs = _tops(
        results, "prompt_top_offsets", "prompt_top_ids", "prompt_top_logprobs", keep_R
    )
    return {
        "prompt_key_R": table.key_N[rows_R[keep_R]],
        "prompt_position_R": _joined(results, "prompt_position")[keep_R],
        "prompt_logprob_R": _joined(results, "prompt_logprob")[keep_R],
        "prompt_token_rank_R": _joined(results, "prompt_token_rank")[keep_R],
        "prompt_top_offsets_R1": top_offsets_R1,
        "prompt_top_ids": top_ids,
        "prompt_top_logprobs": top_logprobs,
    }


def _joined(results: Sequence[StepResult], name: str) -> np.ndarray:
    if len(results) == 1:
        return getattr(results[0], name)
    return np.concatenate([getattr(result, name) for result in results])


def _tops(
    results: Sequence[StepResult], offsets: str, ids: str, logprobs: str, keep: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """These three fields of the rows to keep, ascending; mostly nobody has asked for any."""
    if not any(len(getattr(result, ids)) for result in results):
        first = results[0]
        return np.zeros(len(keep) + 1, np.int32), getattr(first, ids), getattr(first, logprobs)
    all_ids, all_logprobs = _joined(results, ids), _joined(results, logprobs)
    counts = ragged.counts([getattr(result, offsets) for result in results])
    kept = np.repeat(np.isin(np.arange(len(counts)), keep), counts)
    return ragged.offsets(counts[keep]), all_ids[kept], all_logprobs[kept]
