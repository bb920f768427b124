"""Penalties, biases and bans of many rows at once, as the host's loop over rows has them: bit for bit."""

import numpy as np
import pytest
import torch

from expertwire.engine.runner.device_slots import DeviceSlots
from expertwire.engine.runner.slot_states import SlotStates
from expertwire.kernels.gpu import penalties
from expertwire.scheduler.sampling_params import SAMPLING_DTYPE

VOCAB, NUM_SLOTS = 2500, 7


class HostSlots(SlotStates):
    def __init__(self, tokens_SL):
        super().__init__(NUM_SLOTS, 16, (), "cpu")
        self._tokens_SL = tokens_SL

    def known_tokens(self, slot):
        return self._tokens_SL[slot, : self.num_tokens[slot]].long()


def slots_of(rng, tables):
    """Return requests of every kind, the same in all tables."""
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
    for table in tables:
        table.num_tokens[:], table.sampling[:] = known, sampling
        for slot in range(NUM_SLOTS):
            table.set_lists(slot, bans[slot], bias[slot], np.sin(bias[slot]).astype(np.float32))
        table.mark_adjusted(np.arange(NUM_SLOTS))


@pytest.mark.parametrize("max_rows", [64, 3])
@pytest.mark.parametrize("slots", [[0], [5], [3, 1], [6, 5, 4, 3, 2, 1, 0]], ids=str)
def test_the_same_bits_as_row_by_row(slots, max_rows, monkeypatch):
    monkeypatch.setattr(penalties, "MAX_ROWS", max_rows)
    rng = np.random.default_rng(len(slots))
    device = DeviceSlots(num_slots=NUM_SLOTS, max_model_len=64, block_size=16, specs=(), device="cpu")
    device.tokens_SL.copy_(torch.from_numpy(rng.integers(0, 40, device.tokens_SL.shape)))
    host = HostSlots(device.tokens_SL)
    slots_of(rng, [host, device])
    slot_O = np.array(slots)
    expected_OV = torch.randn(len(slots), VOCAB, generator=torch.Generator().manual_seed(1))
    expected_OV[:, ::7] = 0.0
    found_OV = expected_OV.clone()
    host.adjust(expected_OV, slot_O)
    device.adjust_on_device(found_OV, device.uploads(*device.adjustments(slot_O)), slot_O)
    assert torch.equal(found_OV, expected_OV)
    assert bool(found_OV.isinf().any()) == bool({1, 3, 5} & set(slots) - {3}), "bans up to min_tokens"
