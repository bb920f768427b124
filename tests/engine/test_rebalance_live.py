"""Experts move while requests are served: nothing is lost, and no bit changes."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import parity
from helpers import tiny_checkpoints as tiny

from expertwire import LLM, SamplingParams
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.loader.quantization import expert_bytes
from expertwire.engine.models.registry import read_model_config
from expertwire.moe.eplb.load import ExpertLoad
from expertwire.moe.eplb.placement import place
from expertwire.moe.eplb.rebalancer import Rebalancer

ROUNDS, NUM_OUTPUT = 2, 32
TOP_K = 2
PROMPTS = [tiny.prompt(length, seed=length % 3) for length in (5, 40, 17, 3, 64, 100, 33, 9)]


def serve(**options):
    """Everything that an engine says of requests that run together, and its statistics."""
    params = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT, ignore_eos=True, logprobs=8, prompt_logprobs=4)
    seen = []
    with LLM(
        parity.checkpoint("qwen3_moe"),
        dtype="bfloat16",
        launcher="local",
        threads_per_rank=1,
        kv_cache_memory_bytes=20_000_000,
        **options,
    ) as llm:
        for _ in range(ROUNDS):
            for output in llm.generate(PROMPTS, params, use_tqdm=False):
                seen.append(parity.bits(output))
        return seen, llm.stats()


@pytest.fixture(scope="module")
def unmoved():
    seen, stats = serve(ep_size=1)
    assert "rebalancing" not in stats
    return seen


@pytest.fixture
def boards(tmp_path):
    """A topology of two domains of two ranks, of which those of different domains fail together."""
    node = {"ranks": 1}
    domains = [
        {"name": name, "nodes": [{"name": name + row, "failure_domain": row, **node} for row in "xy"]} for name in "ab"
    ]
    path = tmp_path / "boards.json"
    path.write_text(json.dumps({"name": "boards", "domains": domains}))
    return str(path)


@pytest.mark.parametrize(("ep_size", "redundant"), [(2, 0), pytest.param(4, 4, marks=pytest.mark.slow)])
def test_moving_under_load_changes_nothing(unmoved, ep_size, redundant, boards):
    topology = boards if redundant else None
    seen, stats = serve(ep_size=ep_size, num_redundant_experts=redundant, topology=topology, eplb_step_interval=4)
    assert len(seen) == ROUNDS * len(PROMPTS)
    assert all(len(tokens) == NUM_OUTPUT for tokens, _, _ in seen), "a request is not complete"
    moved = stats["rebalancing"]
    assert moved["epoch"] > 0, f"nothing has moved: {moved}"
    assert moved["moved_experts"] > 0, moved
    assert moved["moving_steps"] >= moved["epoch"] - 1, "but for a step that is planned and not committed"
    assert moved["moving_us"] >= moved["longest_us"] > 0
    assert {"predicted_s", "for_windows", "cost_s"} <= set(moved)
    assert seen == unmoved
    # Each token has its experts counted, before and after: the ranks' rows are all there are.
    rows = np.array(stats["expert_load"])
    assert set(rows.sum(axis=1).tolist()) == {0, TOP_K * stats["tokens_computed"]}
    assert sum(stats["rank_rows"]) == pytest.approx(rows.sum())


def test_experts_come_to_lie_where_they_do_not_fail_together():
    placement, fails = place(8, 4, 8, num_layers=2, domains=(0, 0, 1, 1)), np.array([0, 1, 0, 1])

    def apart(placement):
        of_slots = fails[placement.rank_of_X]
        return [len(set(of_slots[row == expert])) > 1 for row in placement.phy2log for expert in range(8)]

    assert not any(apart(placement)), "the second ones lie two ranks on"
    load = ExpertLoad(placement, 2)
    model = read_model_config(str(parity.checkpoint("qwen3_moe")))
    rebalancing = Rebalancer(load, expert_bytes(model, None), window_steps=1, failure_domains=fails.tolist())
    rows = np.tile(np.array([400, 5, 5, 300, 5, 5, 5, 5]), (2, 1))
    step, result = SimpleNamespace(num_tokens_P=np.ones(4), moves=None), SimpleNamespace(forward_us=10**7, move_us=1)
    for _ in range(2):
        rebalancing.committed(step, [result], rows)
        rebalancing.committed(step, [result], rows)
        rebalancing._decision.result(30)
        assert rebalancing.moving or not rebalancing.stats()["rebalances"]
    while (moves := rebalancing.next()[1]) is not None:
        rebalancing.committed(SimpleNamespace(num_tokens_P=np.ones(4), moves=moves), [result], None)
    rebalancing.close()
    assert all(apart(load.placement))
    assert load.placement.domains == (0, 0, 1, 1)


def test_options_that_contradict_it_are_refused(boards):
    with pytest.raises(ValueError, match="eplb_step_interval 5 has no effect with ep_size 1"):
        EngineConfig(model="x", eplb_step_interval=5)
    with pytest.raises(ValueError, match="eplb_step_interval must be an integer >= 0, got -1"):
        EngineConfig(model="x", ep_size=2, eplb_step_interval=-1)
    with pytest.raises(ValueError, match="eplb_step_interval must be 0: Qwen3ForCausalLM has no experts"):
        LLM(parity.checkpoint("qwen3"), ep_size=2, eplb_step_interval=5, launcher="local")
    with pytest.raises(ValueError, match="topology 'hgx8' has no effect with num_redundant_experts 0"):
        EngineConfig(model="x", ep_size=2, topology="hgx8")
    with pytest.raises(ValueError, match="topology must be the path of a file"):
        EngineConfig(model="x", ep_size=2, num_redundant_experts=2, topology=5)
    with pytest.raises(ValueError, match=r"ep_size must be in \[1, 4\], the ranks of 'boards', got 8"):
        LLM(parity.checkpoint("qwen3_moe"), ep_size=8, num_redundant_experts=8, topology=boards, launcher="local")
