"""The plan of a step, from the state of the running batch.

A admitted requests, B new block table entries, M copied blocks, P ranks, S scheduled requests. `rows`
are rows of the running batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from expertwire.scheduler._compiled.steps import StepSchedule
from expertwire.scheduler.block_copies import BlockCopies
from expertwire.scheduler.plan import StepPlan, pack_lists
from expertwire.scheduler.request import Request
from expertwire.scheduler.running import RunningBatch


def plan_fields(
    requests: Sequence[Request],
    record_A: np.ndarray,
    tokens: np.ndarray,
    token_offsets_A1: np.ndarray,
    eos_token_ids: tuple[int, ...],
) -> dict[str, Any]:
    """Return the fields of a `StepPlan` about new requests, without their slots. `tokens`: those to send, joined."""
    bans_A = [request.banned_ids(eos_token_ids) for request in requests]
    biases_A = [request.params.logit_bias or {} for request in requests]
    bans, ban_offsets = pack_lists(bans_A, np.int32)
    bias_ids, bias_offsets = pack_lists([tuple(bias) for bias in biases_A], np.int32)
    bias_values, _ = pack_lists([tuple(bias.values()) for bias in biases_A], np.float32)
    return {
        "admit_sampling_A": np.ascontiguousarray(record_A["sampling"]),
        "admit_token_offsets_A1": token_offsets_A1,
        "admit_tokens": tokens,
        "admit_ban_offsets_A1": ban_offsets,
        "admit_bans": bans,
        "admit_bias_offsets_A1": bias_offsets,
        "admit_bias_ids": bias_ids,
        "admit_bias_values": bias_values,
    }


def build_plan(
    batch: RunningBatch,
    step: StepSchedule,
    *,
    number: int,
    epoch: int,
    report_load: bool,
    released: np.ndarray,
    new_rows: np.ndarray,
    leaders: np.ndarray,
    new: dict[str, Any],
    copies: BlockCopies,
) -> StepPlan:
    """Return the plan of step `number`.

    Args:
        released: rows to release.
        new_rows: rows of the admitted requests.
        leaders: the rows of their leaders; of a request that has none, its own.
        new: `plan_fields` of these requests.
        copies: blocks to copy.
    """
    block_slot_B, block_cache_B, block_index_B, block_id_B = step.block_4B
    return StepPlan(
        epoch=epoch,
        step=number,
        report_load=int(report_load),
        num_tokens_P=np.diff(step.tokens_P1),
        release_offsets_P1=batch.offsets_P1(released),
        release_slot=batch.slot_Z[released],
        admit_offsets_P1=batch.offsets_P1(new_rows),
        admit_slot_A=batch.slot_Z[new_rows],
        admit_source_A=batch.slot_Z[leaders],
        **new,
        block_offsets_P1=step.block_offsets_P1,
        block_slot_B=block_slot_B,
        block_cache_B=block_cache_B,
        block_index_B=block_index_B,
        block_id_B=block_id_B,
        copy_offsets_P1=np.searchsorted(copies.rank_M, np.arange(batch.config.num_ranks + 1)).astype(np.int32),
        copy_cache_M=copies.cache_M,
        copy_from_M=copies.from_M,
        copy_to_M=copies.to_M,
        sched_offsets_P1=step.offsets_P1,
        sched_slot_S=step.slot_S,
        sched_start_S=step.start_S,
        sched_num_S=step.num_S,
        sched_sample_S=step.sample_S,
        sched_source_S=step.source_S,
    )
