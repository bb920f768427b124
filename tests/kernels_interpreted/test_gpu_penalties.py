"""Penalties, biases and bans of many rows at once have the bits of the implementation that goes row by row."""

import numpy as np
import pytest
import torch

from expertwire.engine.runner.input_batch import InputBatch
from expertwire.engine.runner.staging import upload_nowhere
from expertwire.kernels import registry
from expertwire.kernels.gpu import penalties
from expertwire.kernels.gpu.device import describe
from expertwire.scheduler.sampling_params import SAMPLING_DTYPE

VOCAB, NUM_SLOTS = 2500, 7


def batch_of(rng, ops):
    """Requests of every kind."""
    batch = InputBatch(max_num_seqs=NUM_SLOTS, max_model_len=64, block_size=16, specs=(), device="cpu", ops=ops)
    batch.token_ids.copy_(torch.from_numpy(rng.integers(0, 40, batch.token_ids.shape)))
    known = rng.integers(1, 60, NUM_SLOTS)
    sampling = np.zeros(NUM_SLOTS, SAMPLING_DTYPE)
    sampling["prompt_len"], sampling["min_tokens"] = (
        np.maximum(1, known - rng.integers(0, 30, NUM_SLOTS)),
        [0, 90] * 3 + [1],
    )
    sampling["repetition_penalty"] = [1, 1.3, 0.7, 1, 1.1, 1, 2]
    sampling["presence_penalty"] = [0, 0.3, 0, -0.7, 0, 0, 0.1]
    sampling["frequency_penalty"] = [0, 0, 0.11, 0.9, 0, 0, -0.3]
    bans = [rng.permutation(VOCAB)[:num].astype(np.int32) for num in (0, 4, 4, 0, 3000, 1, 2)]
    bias = [rng.permutation(VOCAB)[:num].astype(np.int32) for num in (0, 0, 5, 300, 2400, 1, 2)]
    batch.num_tokens[:] = known
    for slot in range(NUM_SLOTS):
        batch.set_sampling(slot, sampling[slot], bans[slot], bias[slot], np.sin(bias[slot]).astype(np.float32))
    return batch


@pytest.mark.parametrize("max_rows", [64, 3])
@pytest.mark.parametrize("slots", [[0], [5], [3, 1], [6, 5, 4, 3, 2, 1, 0]], ids=str)
def test_the_same_bits_as_row_by_row(slots, max_rows, monkeypatch):
    monkeypatch.setattr(penalties, "MAX_ROWS", max_rows)
    slot_O, logits = np.array(slots), []
    for ops in (registry.plain(), registry.triton(describe("cpu"))):
        batch = batch_of(np.random.default_rng(len(slots)), ops)
        logits_OV = torch.randn(len(slots), VOCAB, generator=torch.Generator().manual_seed(1))
        logits_OV[:, ::7] = 0.0
        batch.change_logits(logits_OV, upload_nowhere(*batch.logit_changes(slot_O)), slot_O)
        logits.append(logits_OV)
    assert torch.equal(*logits)
    assert bool(logits[1].isinf().any()) == bool({1, 3, 5} & set(slots) - {3}), "bans up to min_tokens"
