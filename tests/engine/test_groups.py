"""Groups of branches through the whole engine: what they compute, and that each is what it would be alone, bit by bit."""

import random

import numpy as np
import pytest
from helpers import architectures, parity
from helpers import tiny_checkpoints as tiny
from helpers.branch_client import branch_client
from helpers.slow import slow_but

from expertwire.scheduler.sampling_params import SamplingParams

NUM_OUTPUT = 14
MODELS = {  # options with which requests wait for blocks, or are preempted
    "qwen3_moe": {"kv_cache_memory_bytes": 350_000},
    "nemotron3_super": {"kv_cache_memory_bytes": 900_000, "snapshot_share": 0.0, "snapshot_every": 64},
}
SIZES = {"max_model_len": 300, "max_num_batched_tokens": 64, "max_num_seqs": 12}
KINDS = [(name, dtype, ep, 25) for name in MODELS for dtype in ("float32", "bfloat16") for ep in (1, 2)]
FEW = ("nemotron3_super", "bfloat16", 2, 8)


def folder(name):
    return parity.checkpoint(name) if name == "qwen3_moe" else architectures.folder(name)


def make_case(rng, index):
    """Return a prompt, which begins like others, the number of branches, pause ids, and parameters."""
    prompt = tiny.prompt(120, seed=1)[: rng.choice([0, 30, 64, 100])] + tiny.prompt(rng.randint(1, 70), seed=index)
    pauses = np.array(sorted(rng.sample(range(200), 60)) if rng.random() < 0.3 else [], np.int32)
    temperature, seed = rng.choice([0.8, 1.5]), rng.randrange(10**9)
    params = SamplingParams(temperature=temperature, max_tokens=NUM_OUTPUT, ignore_eos=True, logprobs=0, seed=seed)
    return prompt, rng.randint(2, 7), pauses, params


@pytest.mark.parametrize("kind", slow_but([FEW], [*KINDS, FEW]))
def test_a_branch_is_what_it_would_be_alone(kind):
    name, dtype, ep_size, num_cases = kind
    rng = random.Random(str(kind[:3]))
    cases = [make_case(rng, 100 + index) for index in range(num_cases)]
    wanted, found = [], []
    options = {**SIZES, **MODELS[name], "dtype": dtype, "ep_size": ep_size}
    options["kv_cache_memory_bytes"] *= 2 if (name, dtype) == ("qwen3_moe", "float32") else 1
    with branch_client(folder(name), **options) as client:
        groups = [
            client.submit(prompt, params, count, pause_token_ids=pauses) for prompt, count, pauses, params in cases
        ]
        for ids, (prompt, count, pauses, params) in zip(groups, cases, strict=True):
            branch = rng.randrange(count)
            client.run(ids[branch])
            found.append(client.bits(ids[branch]))
            wanted.append((prompt, params, {"first_branch": branch}))
            # Other branches continue it, after some of its tokens and others.
            begun = [*client.tokens[ids[branch]][: rng.randint(0, NUM_OUTPUT - 4)], *rng.choice([(), (7, 8)])]
            fields = {"first_branch": count, "num_prompt_tokens": len(prompt), "parent": rng.choice(ids)}
            forks = client.submit(prompt + begun, params, 2, pause_token_ids=pauses, **fields)
            client.run(forks[1])
            found.append(client.bits(forks[1]))
            wanted.append((prompt + begun, params, fields | {"parent": None, "first_branch": count + 1}))
        client.run()
        stats = client.stats()
    # Of the hybrid model the states run out first, and these do not grow; `tests/scheduler` has its preemptions.
    assert stats["preemptions"] or name != "qwen3_moe", "no request was preempted"
    assert stats["cached_tokens"]
    assert sum(map(len, client.tokens.values())) == stats["tokens_sampled"] - stats["tokens_dropped"]
    with branch_client(folder(name), dtype=dtype, enable_prefix_caching=False, max_model_len=300) as client:
        for bits, (tokens, params, fields) in zip(found, wanted, strict=True):
            [alone] = client.submit(tokens, params, **fields)
            client.run(alone)
            assert client.bits(alone) == bits, fields


@pytest.mark.parametrize("name", MODELS)
def test_sixteen_branches_compute_their_prompt_once(name):
    num_prompt, num_output, count = 512, 128, 16
    params = SamplingParams(max_tokens=num_output, ignore_eos=True, seed=3)
    options = {"max_model_len": 1024, "max_num_seqs": count, "enable_prefix_caching": False}
    with branch_client(folder(name), kv_cache_memory_bytes=20_000_000, **options) as client:
        ids = client.submit(tiny.prompt(num_prompt, seed=1), params, count)
        peak = 0
        while not all(len(client.tokens[sequence]) > num_output - 3 for sequence in ids):
            client.take()
            if len(client.tokens[ids[-1]]) % 16 == 0 or len(client.tokens[ids[-1]]) > num_output - 8:
                peak = max(peak, *client.stats()["blocks_used"]["full"])
        client.run()
        stats = client.stats()
    assert not stats["preemptions"]
    # The step that is planned when a sequence ends computes each of them once more, and drops it.
    assert stats["tokens_computed"] - count * num_output <= num_prompt
    assert stats["tokens_computed"] >= num_prompt + count * (num_output - 1)
    assert stats["prompt_tokens"] - stats["cached_tokens"] == num_prompt
    assert stats["tokens_sampled"] - stats["tokens_dropped"] == count * num_output
    assert 0 < peak <= (num_prompt + count * num_output) // 16 + count


def test_experts_of_branches():
    """The leader reports the prompt's; each branch those of what it has computed itself."""
    params = SamplingParams(max_tokens=5, ignore_eos=True, seed=3, expert_load=True)
    with branch_client(folder("qwen3_moe"), max_model_len=300, kv_cache_memory_bytes=5_000_000) as client:
        ids = client.submit(tiny.prompt(40, seed=1), params, 3)
        client.run()
        alone = client.submit(tiny.prompt(40, seed=2), params)
        client.run()
        [rows] = [client.routed[sequence] for sequence in alone]
        per_token = rows // (40 + 4)
        assert rows == per_token * 44
        assert [client.routed[sequence] // per_token for sequence in ids] == [44, 4, 4]
