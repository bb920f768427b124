"""The checks of a first run on a GPU, in the interpreter: caches, recurrent mixers, and FlashInfer's attention (a strict
fake) beside ours.
"""

import pytest
import torch
from helpers import fake_flashinfer

from expertwire.bench.kernels import checks_caches, flashinfer, gated_delta_rule, mamba2, selective_scan
from expertwire.bench.kernels.attention import Heads
from expertwire.bench.kernels.measure import TensorRng, run_item
from expertwire.kernels.gpu.device import describe

ROOMS = checks_caches.items, mamba2.check_items, gated_delta_rule.check_items, selective_scan.check_items
ITEMS = {item.key: item for items in ROOMS for item in items(True, True)}


def draw_for(name):
    return TensorRng.of("cpu", describe("cpu"), torch.float32, 0, name)


@pytest.mark.parametrize("name", ITEMS)
def test_caches_and_states(name):
    assert run_item(ITEMS[name], draw_for(name))["ok"]


def test_bits_of_states():
    [item] = mamba2.bits_items()
    found = run_item(item, draw_for(item.key))
    assert found["ok"] and set(found["classes"]) == {"convolved", "y", "tails", "states"}


@pytest.mark.parametrize("batch", [[(1, 17), (1, 40)], [(1, 5), (20, 33)]], ids=["decode", "mixed"])
def test_flashinfer_beside_ours(batch, monkeypatch):
    made = fake_flashinfer.install(monkeypatch)
    theirs, ours = flashinfer.calls(draw_for("flashinfer"), Heads(name="tiny", heads=4, kv_heads=2, dim=32), batch)
    torch.testing.assert_close(theirs(), ours(), rtol=1e-4, atol=1e-5)
    theirs()
    assert all(wrapper.plans == 1 for wrapper in made), "what is timed does not plan"
