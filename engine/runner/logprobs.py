"""The log-probability fields of a result: tensors on the device, and the fields that the host makes of them.

S sequences, T tokens of a step, O sampled rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from expertwire.engine.runner.micro_batch import MicroBatch
from expertwire.engine.runner.staging import Upload
from expertwire.kernels.ops import sampling

_I32, _F32 = np.zeros(0, np.int32), np.zeros(0, np.float32)


def of(
    logits_OV: Tensor,
    token_O: Tensor,
    num_top_O: np.ndarray,
    upload: Upload,
    *,
    are_scores: bool = False,
) -> Sequence[Tensor]:
    """Return log-probabilities, ranks and most probable tokens of the rows that ask (`num_top_O` >= 0), on the device; nothing if
    none does. `are_scores`: the rows are a reward model's scores of labels, which are reported as they are."""
    asked = np.flatnonzero(num_top_O >= 0)
    if not len(asked):
        return ()
    if len(asked) < len(num_top_O):
        [rows] = upload(asked)
        logits_OV, token_O = logits_OV.index_select(0, rows), token_O.index_select(0, rows)
    widest = int(np.minimum(num_top_O[asked], logits_OV.shape[1]).max())
    read = sampling.token_scores if are_scores else sampling.token_logprobs
    return read(logits_OV, token_O.long(), widest)


def fields(found: Sequence[np.ndarray], num_top_O: np.ndarray, vocab: int) -> dict[str, np.ndarray]:
    """Return what `of` found, on the host, as fields of a `StepResult`."""
    count = len(num_top_O)
    logprob_O, rank_O = np.full(count, np.nan, np.float32), np.zeros(count, np.int32)
    offsets_O1, top_ids, top_logprobs = np.zeros(count + 1, np.int32), _I32, _F32
    if len(found):
        asked = num_top_O >= 0
        logprob_O[asked], rank_O[asked] = found[0], found[1]
        if widest := found[2].shape[1]:
            num_top = np.minimum(num_top_O, vocab).clip(0)
            num_top.cumsum(out=offsets_O1[1:])
            kept = np.arange(widest) < num_top[asked, None]
            top_ids, top_logprobs = found[2].astype(np.int32)[kept], found[3][kept]
    return {
        "logprob_O": logprob_O,
        "token_rank_O": rank_O,
        "top_offsets_O1": offsets_O1,
        "top_ids": top_ids,
        "top_logprobs": top_logprobs,
    }


def token_fields(
    slot_O: np.ndarray, token_O: np.ndarray, found: Sequence[np.ndarray], num_top_O: np.ndarray, vocab: int
) -> dict[str, np.ndarray]:
    """Return sampled tokens and `fields` as fields of a `StepResult`. A row whose log-probabilities are NaN has no token: the
    sampler does not see what is wrong with a banned one."""
    more, token_O = fields(found, num_top_O, vocab), token_O.astype(np.int32)
    if len(found):
        token_O[(num_top_O >= 0) & np.isnan(more["logprob_O"])] = -1
    return {"slot_O": slot_O.astype(np.int32), "token_O": token_O, **more}


def prompt_rows(sampling: np.ndarray, step: MicroBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return row i64, slot i32 and position i32 of the predicted token, of every prompt token computed in this step whose
    successor is a prompt token too, for the slots that ask; None if there is none. `sampling`: of all slots."""
    wanted = sampling["prompt_logprobs"][step.slot_S] >= 0
    if not wanted.any():
        return None
    wanted_T = np.repeat(wanted, np.diff(step.cu_seqlens_q))
    rows = np.flatnonzero(wanted_T & (step.position_T + 1 < sampling["prompt_len"][step.slot_T]))
    slots, positions = step.slot_T[rows].astype(np.int32), (step.position_T[rows] + 1).astype(np.int32)
    return (rows, slots, positions) if len(rows) else None


def prompt_fields(slots: np.ndarray, positions: np.ndarray, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return `fields` of prompt rows as fields of a `StepResult`."""
    return {
        "prompt_slot": slots,
        "prompt_position": positions,
        "prompt_logprob": found["logprob_O"],
        "prompt_token_rank": found["token_rank_O"],
        "prompt_top_offsets": found["top_offsets_O1"],
        "prompt_top_ids": found["top_ids"],
        "prompt_top_logprobs": found["top_logprobs"],
    }


# The fields of a step that samples nothing, and of one without prompt rows.
NO_TOKENS: Mapping[str, Any] = {"slot_O": _I32, "token_O": _I32, **fields((), _I32, 0)}
NO_PROMPT_ROWS: Mapping[str, Any] = prompt_fields(_I32, _I32, fields((), _I32, 0))
