"""Models with recurrent states through the whole engine: equal bits in company, in chunks, on several ranks, from a snapshot and
after a preemption."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import architectures
from helpers import tiny_checkpoints as tiny
from helpers.slow import slow_but

from expertwire import LLM, SamplingParams
from expertwire.engine.frontend.api import RequestOptions
from expertwire.engine.models.registry import read_model_config
from expertwire.generation import Job

ENTRY, EVERY = 64, 256  # tokens after which a snapshot can be kept, and is kept
LENGTHS = [1, 2, 17, 63, 64, 65, 150, 300]
NUM_OUTPUT = 16
PARAMS = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT, ignore_eos=True, logprobs=64)
NAMES = slow_but(["nemotron3_super"], ["nemotron3_super", "granite_h", "qwen3_next", "phi4_flash"])


def serve(name, **options):
    fixed = {
        "launcher": "local",
        "threads_per_rank": 1,
        "snapshot_every": EVERY,
        "max_model_len": 512,
        "max_num_seqs": 16,
    }
    return LLM(architectures.folder(name), **{"kv_cache_memory_bytes": 60_000_000, **fixed, **options})


def bits(outputs):
    """Return the requests' tokens and log-probabilities, for comparison bit by bit."""
    found = []
    for output in outputs:
        [completion] = output.outputs
        values = np.array([entry.logprob for at in completion.logprobs for entry in at.values()], np.float32)
        found.append((list(completion.token_ids), values.tobytes()))
    return found


WAYS = {
    "2 ranks, chunks of 48": {"ep_size": 2, "chunked_prefill_size": 48},
    "2 ranks, two-batch overlap": {"ep_size": 2, "chunked_prefill_size": 48, "enable_two_batch_overlap": True},
    "1 rank, chunks of 7": {"ep_size": 1, "chunked_prefill_size": 7},
    "4 ranks, chunks of 64": {"ep_size": 4, "chunked_prefill_size": 64},
}


@pytest.mark.parametrize("way", slow_but(["2 ranks, chunks of 48"], WAYS))
@pytest.mark.parametrize("dtype", slow_but(["bfloat16"], ["float32", "bfloat16"]))
@pytest.mark.parametrize("name", NAMES)
def test_company_chunks_ranks_and_snapshots(name, dtype, way):
    if "overlap" in way and not any(read_model_config(architectures.folder(name)).sparse_layers):
        pytest.skip("a model without experts has no exchanges")
    prompts = [tiny.prompt(length, seed=length) for length in LENGTHS]
    with serve(name, dtype=dtype, enable_prefix_caching=False) as llm:
        alone = [bits(llm.generate([prompt], PARAMS, use_tqdm=False))[0] for prompt in prompts]
    with serve(name, dtype=dtype, **WAYS[way]) as llm:
        for attempt in ("cold", "cached"):
            outputs = llm.generate(prompts, PARAMS, use_tqdm=False)
            assert bits(outputs) == alone, attempt
            found = [output.num_cached_tokens for output in outputs]
            whole = [0 if attempt == "cold" else (length - 1) // ENTRY * ENTRY for length in LENGTHS]
            # Which rank has a prefix is a guess.
            assert all(num in (0, most) for num, most in zip(found, whole, strict=True)), found
            assert any(found) == (attempt == "cached")


@pytest.mark.parametrize("name", NAMES)
def test_a_conversation_goes_on_from_its_last_snapshot(name):
    prompt = tiny.prompt(100, seed=1)
    with serve(name) as llm:
        turns = []
        for turn in range(3):
            [output] = llm.generate(
                [prompt], SamplingParams(temperature=0, max_tokens=50, ignore_eos=True), use_tqdm=False
            )
            turns.append((prompt, list(output.outputs[0].token_ids), output.num_cached_tokens))
            prompt = prompt + turns[-1][1] + tiny.prompt(20, seed=2 + turn)
    # The last token of an answer has not been computed.
    assert [cached for _, _, cached in turns] == [0, 149 // ENTRY * ENTRY, 219 // ENTRY * ENTRY]
    with serve(name, enable_prefix_caching=False) as llm:
        for prompt, answer, _ in turns:
            [output] = llm.generate(
                [prompt], SamplingParams(temperature=0, max_tokens=50, ignore_eos=True), use_tqdm=False
            )
            assert list(output.outputs[0].token_ids) == answer


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nemotron3_super", "qwen3_next"])
def test_experts_move_while_states_go_on(name):
    prompts = [tiny.prompt(length, seed=length) for length in LENGTHS]
    seen = []
    for options in ({}, {"ep_size": 2, "eplb_step_interval": 4}):
        with serve(name, dtype="bfloat16", **options) as llm:
            seen.append([bits(llm.generate(prompts, PARAMS, use_tqdm=False)) for _ in range(4)])
            stats = llm.stats()
    assert stats["rebalancing"]["moved_experts"] > 0, stats["rebalancing"]
    assert seen[0] == seen[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "lengths", "num_output", "nbytes"),
    [
        ("nemotron3_super", "float32", range(30, 400, 37), 130, 800_000),
        ("nemotron3_super", "bfloat16", range(30, 400, 37), 130, 800_000),
        # States and chunks take more than the tokens of short requests do.
        ("qwen3_next", "float32", range(60, 300, 30), 700, 1_400_000),
        ("phi4_flash", "float32", range(30, 400, 37), 130, 1_600_000),
        ("phi4_flash", "bfloat16", range(30, 400, 37), 130, 800_000),
    ],
)
def test_caches_that_are_too_small_give_the_same_bits(name, dtype, lengths, num_output, nbytes):
    """Requests wait for a state, or are preempted and go on from their last snapshot."""
    prompts = [tiny.prompt(length, seed=i) for i, length in enumerate(lengths)]
    params = SamplingParams(temperature=0, max_tokens=num_output, ignore_eos=True, logprobs=64)
    fixed = {"max_model_len": max(lengths) + num_output + 7, "max_num_batched_tokens": 64, "snapshot_share": 0.0}
    answers, preemptions = [], []
    for enough in (60_000_000, nbytes):
        with serve(name, dtype=dtype, kv_cache_memory_bytes=enough, **fixed) as llm:
            answers.append(bits(llm.generate(prompts, params, use_tqdm=False)))
            preemptions.append(llm.stats()["preemptions"])
    assert answers[0] == answers[1]
    assert preemptions[0] == 0
    assert preemptions[1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["granite_h", "qwen3_next"])
def test_requests_that_give_way_give_the_same_bits(name, dtype, share):
    """Another tenant's request takes the place of one that runs, which goes on from its last snapshot or from its beginning."""
    params = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True, logprobs=64)
    jobs = [
        Job(i, None, np.array(tiny.prompt(length, seed=i), np.int32), params, RequestOptions(tenant=tenant))
        for i, (length, tenant) in enumerate([(90, "first"), (230, "first"), (75, "second")])
    ]
    fixed = {"dtype": dtype, "max_num_batched_tokens": 64, "snapshot_share": share}
    with serve(name, **fixed) as llm:
        alone = [bits(llm.generate([job.tokens.tolist()], params, use_tqdm=False))[0] for job in jobs]
    with serve(name, scheduling_policy="fair", max_num_seqs=2, **fixed) as llm:
        *first, late = jobs
        numbers = {llm.frontend.submit(job.tokens, params, job.options): job for job in first}
        while not all(job.finished for job in jobs):
            for update in llm.frontend.poll(0.2):
                assert update.error is None, update.error
                numbers[update.request_id].add(update)
            if len(numbers) < len(jobs) and all(len(job.outputs[0].token_ids) > 20 for job in first):
                numbers[llm.frontend.submit(late.tokens, params, late.options)] = late
        assert llm.stats()["preemptions"] > 0
    assert bits([job.output() for job in jobs]) == alone


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nemotron3_super", {"snapshot_every": 96}, "snapshot_every must be a multiple of 64"),
        ("nemotron3_super", {"block_size": 128, "snapshot_every": 192}, "snapshot_every must be a multiple of 128"),
        ("llama", {"snapshot_every": 64}, "snapshot_every has no effect"),
        ("llama", {"snapshot_share": 0.1}, "snapshot_share has no effect"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        LLM(architectures.folder(name), launcher="local", **options)


@pytest.mark.slow
def test_prompt_logprobs_are_transformers():
    name, ids = "nemotron3_nano", tiny.prompt(200, seed=5)
    expected = torch.from_numpy(architectures.reference_logits(name, ids)).log_softmax(-1).numpy()
    with serve(name, dtype="float32") as llm:
        [output] = llm.generate([ids], SamplingParams(max_tokens=1, prompt_logprobs=1), use_tqdm=False)
    found = [at[token].logprob for at, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
    np.testing.assert_allclose(found, expected[np.arange(199), ids[1:]], atol=1e-3)
