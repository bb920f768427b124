"""What a step's results say about requests: `StepOutputs`, gathered from all ranks' `StepResult`s.

Shape letters as in `plan`, and N rows of the running table.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import numpy as np

from expertwire.scheduler import ragged
from expertwire.scheduler._compiled.steps import Sampled, Scheduled
from expertwire.scheduler.plan import StepOutputs, StepResult
from expertwire.scheduler.running import RunningTable


def gather(
    step: Scheduled,
    results: Sequence[StepResult],
    table: RunningTable,
    eos_ids: np.ndarray,
    may_stop_V: np.ndarray,
) -> tuple[np.ndarray, StepOutputs]:
    """Take a step's results (of all ranks, in their order) into the table, but for what is said of requests that are gone.

    Returns:
        i64 [O], the outputs' rows of the table; and the outputs, whose finish reasons may be `ASK`, see `RunningTable.take_in`.
    """
    slot_O, offsets_P1 = ragged.pack([result.slot_O for result in results], np.int32)
    sampled = Sampled(slot_O, *(_joined(results, name) for name in Sampled._fields[1:]))
    known, going_N = table.take_in(results[0].step, step, offsets_P1, sampled, eos_ids, may_stop_V)
    top_offsets_O1, top_ids, top_logprobs = _tops(results, "top_offsets_O1", "top_ids", "top_logprobs", known.at_O)
    return known.row_O, StepOutputs(
        step=results[0].step,
        key_O=known.key_O,
        token_O=known.token_O,
        finish_O=known.finish_O,
        num_cached_O=known.num_cached_O,
        logprob_O=known.logprob_O,
        token_rank_O=known.token_rank_O,
        top_offsets_O1=top_offsets_O1,
        top_ids=top_ids,
        top_logprobs=top_logprobs,
        **_prompt_logprobs(results, going_N, table),
        **_routed(results, going_N, table),
    )


def _prompt_logprobs(results: Sequence[StepResult], going_N: np.ndarray, table: RunningTable) -> dict[str, np.ndarray]:
    """The fields about prompts."""
    if _any_of(results, "prompt_slot"):
        rows_R = table.rows_of([result.prompt_slot for result in results])
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


def _routed(results: Sequence[StepResult], going_N: np.ndarray, table: RunningTable) -> dict[str, np.ndarray]:
    """The fields about experts."""
    if not _any_of(results, "routed"):
        nothing = results[0].routed
        return {"routed_key_C": nothing.astype(np.int64), "routed_expert_C": nothing, "routed_tokens_C": nothing}
    parts = [result.routed.reshape(-1, 3) for result in results]
    rows_C = table.rows_of([part[:, 0] for part in parts])
    keep_C = np.flatnonzero(going_N[rows_C])
    _, expert_C, tokens_C = np.concatenate(parts)[keep_C].T.copy()
    return {"routed_key_C": table.key_N[rows_C[keep_C]], "routed_expert_C": expert_C, "routed_tokens_C": tokens_C}


def _any_of(results: Sequence[StepResult], name: str) -> bool:
    return any(map(len, map(attrgetter(name), results)))


def _joined(results: Sequence[StepResult], name: str) -> np.ndarray:
    if len(results) == 1:
        return getattr(results[0], name)
    return np.concatenate([*map(attrgetter(name), results)])


def _tops(
    results: Sequence[StepResult], offsets: str, ids: str, logprobs: str, keep: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """These three fields of the rows to keep, ascending; mostly nobody has asked for any."""
    if not _any_of(results, ids):
        first = results[0]
        return np.zeros(len(keep) + 1, np.int32), getattr(first, ids), getattr(first, logprobs)
    all_ids, all_logprobs = _joined(results, ids), _joined(results, logprobs)
    counts = ragged.counts([getattr(result, offsets) for result in results])
    kept = np.repeat(np.isin(np.arange(len(counts)), keep), counts)
    return ragged.offsets(counts[keep]), all_ids[kept], all_logprobs[kept]
