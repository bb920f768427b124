"""Captured steps of several ranks that write into each other's memory, between which experts move, beside the same steps without
graphs and moves. All kernels are interpreted, and the ranks are processes."""

import numpy as np
import torch
from helpers import tiny_checkpoints
from helpers.fake_graphs import FakeCapture
from helpers.ranks import Ranks

from expertwire.comm import symmetric_memory
from expertwire.comm.all_to_all.base import AllToAllSpec
from expertwire.comm.all_to_all.nvlink_gpu import NvlinkGpuAllToAll
from expertwire.comm.all_to_all.symmetric_buffer import BufferLayout
from expertwire.comm.group import all_gather_rows
from expertwire.engine.layers.step import RankContext
from expertwire.engine.loader.checkpoint import Checkpoint
from expertwire.engine.loader.weights import load_model
from expertwire.engine.models.registry import read_model_config
from expertwire.engine.runner.model_runner import ModelRunner
from expertwire.kernels import registry as kernels
from expertwire.kernels.gpu.device import describe
from expertwire.moe.eplb.migration import Migration
from expertwire.moe.eplb.mover import ExpertMover
from expertwire.moe.eplb.placement import Placement, place
from expertwire.scheduler.config import SchedulerConfig
from expertwire.scheduler.plan import StepResult
from expertwire.scheduler.request import Request
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.scheduler.scheduler import Scheduler

SIZES = {"max_model_len": 32, "block_size": 16}
NUM_BLOCKS, MAX_RUNNING, MAX_TOKENS = 9, 2, 2
LENGTHS = [(3, 4), (1, 2), (2, 2)]  # of prompts and outputs


def build(group, folder, capture):
    config, ops = read_model_config(folder, "float32"), kernels.triton(describe("cpu"))
    placement = place(config.num_experts, group.size, 2, config.num_layers)
    spec = AllToAllSpec(
        group=group,
        rank_offsets=placement.rank_offsets,
        max_tokens=MAX_TOKENS,
        hidden_size=config.hidden_size,
        top_k=config.top_k,
        dtype=torch.float32,
        timeout_s=60,
    )
    memories = symmetric_memory.shared(group, BufferLayout.of(spec).nbytes)
    all_to_all = NvlinkGpuAllToAll(spec, memories, num_programs=2, max_turns=10**9)
    context = RankContext(
        rank=group.rank,
        dtype=torch.float32,
        device="cpu",
        ops=ops,
        placement=placement,
        all_to_alls=(all_to_all,),
    )
    model, specs = load_model(config, context, Checkpoint(folder)), config.cache_specs()
    caches = model.allocate(num_blocks=[NUM_BLOCKS] * len(specs), **SIZES)
    layers = {i: layer.moe for i, layer in enumerate(model.layers) if layer.moe is not None}
    mover = ExpertMover(layers, placement, group)
    options = {"num_ranks": group.size, "max_num_seqs": MAX_RUNNING, "capture": capture, "mover": mover}
    runner = ModelRunner(model=model, caches=caches, **options, **SIZES)
    runner.warm_up(max_num_batched_tokens=MAX_TOKENS, max_num_seqs=MAX_RUNNING)
    return config, runner, Migration(placement, exchanged(placement, list(layers)), max_moves=3)


def exchanged(placement, layers):
    """Another placement: in these layers, two ranks have each other's experts."""
    ids = placement.phy2log.copy()
    ids[layers] = np.roll(ids[layers], ids.shape[1] // 2, axis=1)
    return Placement(num_logical=placement.num_logical, phy2log=ids, rank_offsets=placement.rank_offsets)


def schedule(group, config):
    limits = {
        "max_num_seqs": MAX_RUNNING,
        "max_num_batched_tokens": MAX_TOKENS,
        "num_blocks": NUM_BLOCKS,
        "max_queued_requests": 9,
    }
    ids = {"eos_token_ids": (), "vocab_size": config.vocab_size}
    return Scheduler(SchedulerConfig(num_ranks=group.size, **limits, **ids, **SIZES), config.cache_specs())


def serve(group, folder, captured):
    """Tokens and log-probabilities by request, this rank's load of experts, and of each step that was replayed this rank's tokens
    and the most of a sequence. Every rank has a scheduler of its own, and they agree. With graphs, experts move before the first
    steps."""
    capture = FakeCapture() if captured else None
    config, runner, migration = build(group, folder, capture)
    scheduler = schedule(group, config)
    for key, (length, max_tokens) in enumerate(LENGTHS):
        prompt = np.array(tiny_checkpoints.safe_prompt(folder, length, seed=key), np.int32)
        params = SamplingParams(max_tokens=max_tokens, logprobs=2, temperature=0.5 * key)
        assert scheduler.submit(Request(key=key, prompt=prompt, params=params, seed=7 * key), 0.0) is None
    seen, load, replayed, switched = [], 0, [], []
    while not scheduler.idle:
        moves = migration.next_moves() if captured else None
        plan = scheduler.plan(0.0, report_load=True, moves=moves)
        before = capture.replays if capture else 0
        result = runner.launch(plan).finish()
        if capture and capture.replays > before:
            most = int(plan.rank(group.rank).sched_num_S.max(initial=0))
            replayed.append((plan.num_tokens_P.tolist()[group.rank], most, int(plan.num_tokens_P.max())))
            switched.append(moves is not None and len(moves.logical_X) > 0)
        load = load + result.expert_load
        outputs = scheduler.commit(plan, everyones_results(group, result), 0.0)
        seen.append([outputs.key_O, outputs.token_O, outputs.logprob_O, outputs.top_ids, outputs.top_logprobs])
    return seen, load, replayed, switched


def everyones_results(group, result):
    [words] = result.to_arrays().values()
    lengths = all_gather_rows(group, torch.tensor([len(words)])).flatten().tolist()
    rows = all_gather_rows(group, torch.from_numpy(np.resize(words, max(lengths)))).numpy()
    return [StepResult.from_arrays({"StepResult": row[:num]}) for row, num in zip(rows, lengths, strict=True)]


def test_graphs_of_several_ranks_and_moving_experts_change_nothing():
    folder = tiny_checkpoints.cached("qwen3_moe", num_hidden_layers=2)
    with Ranks(2, timeout_s=200) as ranks:
        without, found = (ranks.run(serve, folder, captured) for captured in (False, True))
    for (seen, rows, _, switched), (expected_seen, expected_rows, none, _) in zip(found, without, strict=True):
        assert not none
        assert len(seen) == len(expected_seen)
        for step, expected_step in zip(seen, expected_seen, strict=True):
            for values, expected in zip(step, expected_step, strict=True):
                np.testing.assert_array_equal(values, expected)
        np.testing.assert_array_equal(rows, expected_rows)
        assert True in switched[:-1], "nothing is replayed behind the switch"
    replayed_PN = [replayed for _, _, replayed, _ in found]
    steps = {step for of_rank in replayed_PN for step in of_rank}
    assert {0, 1, 2} <= {num for num, _, _ in steps}, f"no rank was without tokens, or none had two: {steps}"
    assert any(most > 1 for _, most, _ in steps), f"no chunk of a prompt was replayed: {steps}"
    assert any(num == 1 < most for num, _, most in steps), f"none was replayed beside a longer one: {steps}"
