"""Which experts the tokens of a request went to: exact, once for every token, the same at any number of ranks."""

import contextlib
from dataclasses import fields

import numpy as np
import pytest
import torch
from helpers import parity
from helpers import tiny_checkpoints as tiny

from expertwire import LLM, SamplingParams
from expertwire.engine import controller
from expertwire.engine.models.registry import read_model_config
from expertwire.scheduler.outputs import StepOutputs

VARIANT, TOP_K, BLOCK = "qwen3_moe", 2, 16
LENGTHS, NUM_OUTPUT = (1, 17, 130), 8


def serve(**options):
    return LLM(parity.checkpoint(VARIANT), dtype="float32", launcher="local", threads_per_rank=1, **options)


def params(**values):
    defaults = {"temperature": 0, "max_tokens": NUM_OUTPUT, "ignore_eos": True, "expert_load": True}
    return SamplingParams(**{**defaults, **values})


def ask(llm, prompts, **values):
    """By layer and expert, of each prompt's first output, and the answers."""
    outputs = llm.generate(prompts, params(**values), use_tqdm=False)
    return [np.array(output.outputs[0].expert_load) for output in outputs], outputs


def of_reference(ids):
    """[L, E]: where transformers' routers send these tokens; zeros in layers without experts."""
    model = tiny._reference(str(parity.checkpoint(VARIANT)))
    load = np.zeros((model.config.num_hidden_layers, model.config.num_experts), np.int64)

    def counter(layer):
        def count(module, given, output):
            np.add.at(load[layer], output[2].flatten().numpy(), 1)

        return count

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            if hasattr(layer.mlp, "gate"):
                hooks.callback(layer.mlp.gate.register_forward_hook(counter(i)).remove)
        model(torch.tensor([list(ids)]), use_cache=False)
    return load


@pytest.fixture(scope="module")
def cases():
    return [parity.case(VARIANT, length) for length in LENGTHS]


@pytest.fixture(scope="module")
def llm():
    with serve(kv_cache_memory_bytes=20_000_000) as served:
        yield served


@pytest.fixture(scope="module")
def alone(llm, cases):
    return ask(llm, [case.ids for case in cases])[0]


def test_as_transformers_routes_them(cases, alone):
    for case, load in zip(cases, alone, strict=True):
        computed = case.ids + case.greedy[: NUM_OUTPUT - 1]  # the last token is not
        assert load.tolist() == of_reference(computed).tolist()
        assert set(load.sum(axis=1).tolist()) == {0, TOP_K * len(computed)}, "one layer is dense"


@pytest.mark.parametrize(
    "options",
    [
        {"ep_size": 2, "enable_two_batch_overlap": True, "max_num_batched_tokens": 33},
        pytest.param({"ep_size": 4, "num_redundant_experts": 3}, marks=pytest.mark.slow),
    ],
    ids=["2 ranks, halves", "4 ranks"],
)
def test_at_any_number_of_ranks(cases, alone, options):
    with serve(kv_cache_memory_bytes=20_000_000, **options) as llm:
        found, _ = ask(llm, [case.ids for case in cases])
        total = np.array(llm.stats()["expert_load"])
    assert all(map(np.array_equal, found, alone))
    assert np.array_equal(total, np.sum(alone, axis=0)), "the requests' are all there is"


def test_ends_branches_and_those_who_do_not_ask(cases, alone):
    case, load = cases[1], alone[1]
    prompt, stop = case.ids, case.greedy[3]
    assert stop not in case.greedy[:3]
    with serve(kv_cache_memory_bytes=20_000_000, enable_prefix_caching=False) as llm:
        [stopped], [answer] = ask(llm, [prompt], stop_token_ids=[stop])
        assert len(answer.outputs[0].token_ids) == 4
        assert stopped.tolist() == of_reference(prompt + case.greedy[:3]).tolist(), (
            "what was planned ahead does not count"
        )
        [answer] = llm.generate([prompt], params(n=2), use_tqdm=False)
        # The prompt is computed once for both, and counts for the first.
        of_outputs = load - of_reference(prompt)
        loads = [np.array(output.expert_load).tolist() for output in answer.outputs]
        assert loads == [load.tolist(), of_outputs.tolist()]
        plain, asked = llm.generate([prompt] * 2, [params(expert_load=False), params()], use_tqdm=False)
    assert plain.outputs[0].expert_load is None
    assert asked.outputs[0].expert_load == load.tolist()
    assert plain.outputs[0].token_ids == asked.outputs[0].token_ids


@pytest.mark.usefixtures("alone")
def test_what_the_cache_has_is_not_computed(llm, cases):
    case = cases[2]
    [load], [answer] = ask(llm, [case.ids])
    cached = answer.num_cached_tokens
    assert cached == 128
    whole = of_reference(case.ids + case.greedy[: NUM_OUTPUT - 1])
    assert load.tolist() == (whole - of_reference(case.ids[:cached])).tolist()


@pytest.mark.slow
def test_tokens_computed_twice_count_once():
    """Requests are preempted where blocks are short, and then computed again."""
    prompts = [tiny.prompt(20 + 3 * i, seed=i) for i in range(12)]
    specs = read_model_config(str(parity.checkpoint(VARIANT))).cache_specs()
    found, preemptions = [], []
    for blocks in (400, 17):
        size = blocks * BLOCK * sum(spec.bytes_per_token for spec in specs)
        with serve(kv_cache_memory_bytes=size, max_model_len=200) as llm:
            found.append(ask(llm, prompts, max_tokens=60)[0])
            preemptions.append(llm.stats()["preemptions"])
    assert preemptions[0] == 0 < preemptions[1]
    assert all(map(np.array_equal, *found))
    sums = [load.sum(axis=1).max() for load in found[1]]
    assert sums == [TOP_K * (len(prompt) + 60 - 1) for prompt in prompts]


def test_each_frontend_hears_of_its_own_requests():
    outputs = {field.name: np.zeros(1 if "offsets" in field.name else 0, np.int64) for field in fields(StepOutputs)}
    counts = {
        "routed_keys": [(1 << 40) + 5, 7, (1 << 40) + 5],
        "routed_experts": [3, 4, 5],
        "routed_tokens": [6, 7, 8],
        "failed_keys": [9, (1 << 40) + 8],
        "failed_positions": [0, 1],
        "failed_ranks": [1, 2],
    }
    outputs |= {"step": 0, **{name: np.array(values) for name, values in counts.items()}}
    told = controller._outputs_for(1, StepOutputs(**outputs), all_of_them=False)
    assert told.routed_keys.tolist() == [5, 5]
    assert (told.failed_keys.tolist(), told.failed_ranks.tolist()) == ([8], [2])
    assert (told.routed_experts.tolist(), told.routed_tokens.tolist()) == ([3, 5], [6, 8])


def test_a_dense_model_has_none():
    with (
        LLM(parity.checkpoint("qwen3"), launcher="local", threads_per_rank=1, kv_cache_memory_bytes=20_000_000) as llm,
        pytest.raises(ValueError, match="expert_load must be False: Qwen3ForCausalLM has no experts"),
    ):
        llm.generate([[1, 2]], params(), use_tqdm=False)
    with pytest.raises(ValueError, match="expert_load must be True or False, got 1"):
        SamplingParams(expert_load=1)
