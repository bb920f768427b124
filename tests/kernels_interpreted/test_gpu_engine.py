"""A rank's steps as on a GPU, all kernels interpreted, beside the same steps on the CPU: scheduler, slots, model, sampling. Steps
of single queries are captured, but for those of a request that has asked for its experts."""

import numpy as np
import pytest
import torch
from helpers import architectures, tiny_checkpoints
from helpers.fake_graphs import FakeCapture

from expertwire.comm.all_to_all.base import AllToAllSpec
from expertwire.comm.all_to_all.local import LocalAllToAll
from expertwire.comm.all_to_all.reference import ReferenceAllToAll
from expertwire.comm.group import SoloGroup
from expertwire.engine.layers.step import RankContext
from expertwire.engine.loader.checkpoint import Checkpoint
from expertwire.engine.loader.weights import load_model
from expertwire.engine.models.registry import read_model_config
from expertwire.engine.runner.model_runner import ModelRunner
from expertwire.kernels import registry as kernels
from expertwire.kernels.gpu.device import describe
from expertwire.moe.eplb.placement import place
from expertwire.scheduler.config import SchedulerConfig
from expertwire.scheduler.request import Request
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.scheduler.scheduler import Scheduler

SIZES = {"max_model_len": 64, "block_size": 16}
NUM_BLOCKS, MAX_RUNNING = 17, 4


def build(folder, ops, num_micro_batches, capture):
    config = read_model_config(folder, "float32")
    placement = place(config.num_experts, 1) if any(config.sparse_layers) else None
    all_to_alls = ()
    if placement is not None:
        spec = AllToAllSpec(
            group=SoloGroup(),
            rank_offsets=placement.rank_offsets,
            max_tokens=32,
            hidden_size=config.hidden_size,
            top_k=config.top_k,
            dtype=torch.float32,
        )
        one = LocalAllToAll(spec, ops.permute) if ops.on_device else ReferenceAllToAll(spec)
        all_to_alls = (one,) * num_micro_batches
    context = RankContext(
        rank=0, dtype=torch.float32, device="cpu", ops=ops, placement=placement, all_to_alls=all_to_alls
    )
    model = load_model(config, context, Checkpoint(folder))
    specs = config.cache_specs()
    caches = model.allocate(num_blocks=[NUM_BLOCKS] * len(specs), **SIZES)
    options = {"num_ranks": 1, "num_micro_batches": num_micro_batches, "max_num_seqs": MAX_RUNNING, "capture": capture}
    return config, ModelRunner(model=model, caches=caches, **options, **SIZES)


def requests(folder):
    def request(key, length, **values):
        prompt = np.array(tiny_checkpoints.safe_prompt(folder, length, seed=key % 3), np.int32)
        return Request(key=key, prompt=prompt, params=SamplingParams(**values), seed=7 * key)

    return [
        request(0, 5, max_tokens=4, logprobs=3, expert_load=True),
        request(1, 20, max_tokens=6, temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, logprobs=0),
        request(2, 17, max_tokens=4, prompt_logprobs=2, repetition_penalty=1.5, frequency_penalty=0.3),
        request(3, 20, max_tokens=3, temperature=1.5, min_tokens=2, stop_token_ids=[3, 4], logit_bias={5: 2.0}),
        request(6, 33, max_tokens=2, logprobs=1),  # begins like 3 and 0, if that has been computed
    ]


def serve(folder, ops, asked, num_micro_batches=1, capture=None):
    """Tokens and log-probabilities by request, the ranks' load, and the experts of the request that has asked."""
    config, runner = build(folder, ops, num_micro_batches, capture)
    if ops.on_device:
        runner.warm_up(max_num_batched_tokens=4, max_num_seqs=2)
    scheduler = Scheduler(
        SchedulerConfig(
            num_ranks=1,
            max_num_seqs=MAX_RUNNING,
            max_num_batched_tokens=24,
            num_blocks=NUM_BLOCKS,
            max_queued_requests=9,
            eos_token_ids=(),
            vocab_size=config.vocab_size,
            original_max_position_embeddings=config.original_max_position_embeddings,
            **SIZES,
        ),
        config.cache_specs(),
    )
    for request in asked:
        assert scheduler.submit(request, 0.0) is None
    tokens, logprobs, prompts = {}, {}, {}
    of_first = np.zeros(config.num_layers * config.num_experts, np.int64)
    while not scheduler.idle:
        plan = scheduler.plan(0.0, report_load=True)
        result = runner.launch(plan).finish()
        load = result.expert_load
        outputs = scheduler.commit(plan, [result], 0.0)
        for i, key in enumerate(outputs.key_O.tolist()):
            tokens.setdefault(key, []).append(int(outputs.token_O[i]))
            logprobs.setdefault(key, []).append((outputs.logprob_O[i], outputs.token_rank_O[i]))
            top = slice(*outputs.top_offsets_O1[i : i + 2])
            logprobs[key] += zip(outputs.top_logprobs[top], outputs.top_ids[top], strict=True)
        for i, key in enumerate(outputs.prompt_key_I.tolist()):
            prompts.setdefault(key, []).append((outputs.prompt_logprob_I[i], outputs.prompt_position_I[i]))
        assert not outputs.routed_keys.any(), "only request 0 has asked"
        np.add.at(of_first, outputs.routed_experts, outputs.routed_tokens)
    return tokens, logprobs, prompts, load, of_first


def check_outputs(found, expected):
    assert found[0] == expected[0]
    for part in (1, 2):
        assert found[part].keys() == expected[part].keys()
        for key, pairs in expected[part].items():
            np.testing.assert_allclose(np.array(found[part][key]), np.array(pairs), atol=2e-4)


@pytest.mark.parametrize("kind", ["qwen3_moe"])
@pytest.mark.parametrize(("num_micro_batches", "num_requests"), [(1, 5), (2, 2)], ids=["whole steps", "halves"])
def test_the_same_tokens_as_on_the_cpu(kind, num_micro_batches, num_requests):
    folder = tiny_checkpoints.cached(kind, num_hidden_layers=2)  # one sparse, one dense
    expected = serve(folder, kernels.cpu(), requests(folder)[:num_requests])
    capture = FakeCapture()
    gpu = kernels.triton(describe("cpu"))
    found = serve(folder, gpu, requests(folder)[:num_requests], num_micro_batches, capture)
    assert capture.replays > 0
    check_outputs(found, expected)
    np.testing.assert_array_equal(found[3], expected[3])
    np.testing.assert_array_equal(found[4], expected[4])
    assert found[4].sum() == 2 * (5 + 4 - 1)  # of its tokens all but the last, in the layer with experts


def test_long_and_short_requests_in_one_batch():
    """LongRoPE of an original context of 16 tokens."""
    folder, capture = architectures.folder("phi4_mini"), FakeCapture()

    def request(key, length, num):
        prompt = np.array(tiny_checkpoints.prompt(length, seed=key), np.int32)
        return Request(key=key, prompt=prompt, params=SamplingParams(max_tokens=num, logprobs=2, temperature=0), seed=0)

    def answers(ops, *capture):
        return serve(
            folder, ops, [request(*sizes) for sizes in ((0, 5, 4), (1, 20, 3), (2, 10, 7), (3, 9, 9))], 1, *capture
        )

    expected, found = answers(kernels.cpu()), answers(kernels.triton(describe("cpu")), capture)
    assert capture.replays > 0
    check_outputs(found, expected)
