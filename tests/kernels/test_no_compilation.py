"""After warm-up no step launches a kernel that was not compiled: a compilation of seconds would stop all ranks."""

import os
import time
import weakref
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

import torch
from helpers.cache_model import SPECS
from helpers.fake_graphs import FakeCapture
from helpers.fake_launches import FakeLaunches
from helpers.launched_runner import MAX_RUNNING, NUM_BLOCKS, SIZES, build
from helpers.slow import slow_but
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from expertwire.comm.all_to_all.nvlink_gpu import NvlinkGpuAllToAll
from expertwire.engine.kv_cache.caches import copy_blocks
from expertwire.engine.models.decoder import Decoder
from expertwire.engine.runner.cuda_graphs import Captured
from expertwire.engine.runner.input_batch import InputBatch
from expertwire.engine.runner.staging import upload_nowhere
from expertwire.kernels import registry
from expertwire.kernels.ops import attention
from expertwire.scheduler.config import SchedulerConfig
from expertwire.scheduler.request import Request
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.scheduler.scheduler import Scheduler


def capture(work):
    """Return a graph that does nothing when it is replayed."""
    return Captured(lambda: None, work())


def random_request(rng, key, most):
    prompt = rng.integers(0, 50, int(np.exp(rng.uniform(0, np.log(most)))) or 1).astype(np.int32)
    options = {
        "temperature": float(rng.choice([0.0, 0.7])),
        "top_k": int(rng.choice([-1, 20])),
        "top_p": float(rng.choice([1.0, 0.9])),
        "logprobs": rng.choice([None, 0, 3]),
        "prompt_logprobs": rng.choice([None, None, 1]),
        "repetition_penalty": float(rng.choice([1.0, 1.2])),
        "frequency_penalty": float(rng.choice([0.0, 0.5])),
        "logit_bias": {5: 1.0} if rng.random() < 0.3 else None,
        "expert_load": bool(rng.random() < 0.2),
        "max_tokens": int(rng.integers(1, 12)),
    }
    return Request(key=key, prompt=prompt, params=SamplingParams(**options), seed=int(rng.integers(1 << 40)))


@pytest.mark.parametrize("captured", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("num_ranks", [1, 2], ids="EP {}".format)
def test_random_steps_compile_nothing(num_ranks, captured):
    compile_nothing(np.random.default_rng(num_ranks), num_ranks, captured, num_requests=30)


MIXERS = ["gpt_oss_mxfp4", "llama4_scout", "phi4_mini", "qwen3_next", "nemotron_h", "granite_h", "phi4_flash"]


@pytest.mark.parametrize("fast", slow_but([False], [False, True]), ids=["invariant", "fast"])
@pytest.mark.parametrize("name", slow_but(["qwen3_next"], MIXERS))
def test_other_mixers_compile_nothing(name, fast):
    """Windows, sinks, chunks, LongRoPE by request, and recurrent mixers, in captured steps: what a capture refuses is refused."""
    architectures = pytest.importorskip("helpers.architectures")  # needs transformers
    options = {"folder": architectures.folder(name), "fast": fast, "num_blocks": 1000}
    compile_nothing(np.random.default_rng(5), 1, True, num_requests=20, max_tokens=512, longest=900, **options)


def compile_nothing(rng, num_ranks, captured, *, num_requests, max_tokens=8192, longest=8000, **options):
    """Serve random requests, half of them short, and check that every kernel of a step was launched in the warm-up."""
    with FakeLaunches() as gpu:
        config, runner = build(num_ranks, max_tokens, FakeCapture(gpu) if captured else None, **options)
        runner.warm_up(max_num_batched_tokens=max_tokens, max_num_seqs=MAX_RUNNING)
        warm = {(launch.kernel, launch.variant) for launch in gpu.take()}
        specs = config.cache_specs()
        scheduler = Scheduler(
            SchedulerConfig(
                num_ranks=num_ranks,
                max_num_seqs=MAX_RUNNING,
                max_num_batched_tokens=max_tokens,
                num_blocks=(options.get("num_blocks", NUM_BLOCKS),) * len(specs),
                max_queued_requests=999,
                eos_token_ids=(),
                vocab_size=config.vocab_size,
                original_max_position_embeddings=config.original_max_position_embeddings,
                **SIZES,
            ),
            specs,
        )
        for key in range(num_requests):
            assert scheduler.submit(random_request(rng, key, 20 if key % 2 else longest), 0.0) is None
            for _ in range(int(rng.integers(3))):
                step(scheduler, runner, num_ranks)
        for _ in range(15):
            step(scheduler, runner, num_ranks)
    assert len(warm) > 10
    late = {(launch.kernel, launch.variant) for launch in gpu.take() if launch.variant} - warm
    assert not late, f"{len(late)} compilations after {len(warm)}: {sorted(late)[:4]}"


def step(scheduler, runner, num_ranks):
    plan = scheduler.plan(0.0, report_load=True)
    if plan is not None:
        result = runner.launch(plan).finish()
        scheduler.commit(plan, [results_of(plan, rank, result) for rank in range(num_ranks)], 0.0)


def results_of(plan, rank, result):
    """Return what any rank returns: tokens 0."""
    if rank == 0:
        return result
    mine = plan.rank(rank)
    return nothing(plan, rank, mine.sched_slot_S[mine.sched_sample_S != 0], result)


def nothing(plan, rank, slot_O, like):
    from expertwire.engine.runner import logprobs
    from expertwire.scheduler.plan import StepResult

    fields = logprobs.fields((), np.full(len(slot_O), -1), 1) | logprobs.NO_PROMPT_ROWS
    tokens = {"slot_O": slot_O.astype(np.int32), "token_O": np.zeros(len(slot_O), np.int32)}
    empty = {"expert_load": np.zeros_like(like.expert_load), "routed": like.routed[:0]}
    return StepResult(step=plan.step, rank=rank, forward_us=0, move_us=0, **empty, **tokens, **fields)


def launches(runner, gpu, specs, requests, chunk, num_steps):
    """Return the launches beside the graph in the last of some steps, by name, and the host's time in µs."""
    limits = {
        "max_num_seqs": MAX_RUNNING,
        "max_num_batched_tokens": chunk,
        "num_blocks": NUM_BLOCKS,
        "max_queued_requests": 999,
    }
    config = SchedulerConfig(num_ranks=1, eos_token_ids=(), vocab_size=99, **limits, **SIZES)
    scheduler = Scheduler(config, specs)
    for request in requests:
        assert scheduler.submit(request, 0.0) is None
    for _ in range(num_steps):
        plan = scheduler.plan(0.0)
        gpu.take()
        started = time.perf_counter()
        launched = runner.launch(plan)
        host_us = (time.perf_counter() - started) * 1e6
        counts = Counter(launch.kernel for launch in gpu.take())
        scheduler.commit(plan, [launched.finish()], 0.0)
    return counts, host_us


def test_launches_of_a_step():
    """Beside a graph: one copy up and one home, the inputs of the graph, the logits, sampling, the tokens written down; and four
    launches for penalties, however many rows ask for them."""

    def request(key, length, **options):
        params = SamplingParams(max_tokens=9, temperature=0.0, **options)
        return Request(key=key, prompt=np.arange(length, dtype=np.int32) % 50, params=params, seed=1)

    with FakeLaunches() as gpu:
        config, runner = build(1, 8192, capture)
        runner.warm_up(max_num_batched_tokens=8192, max_num_seqs=MAX_RUNNING)
        plain, long = [request(key, 20) for key in range(16)], request(98, 3000)
        other = request(99, 3000)
        odd = [request(key, 20, repetition_penalty=1.2, logit_bias={5: 1.0}) for key in range(16)]
        for order, each in enumerate([*plain, *odd, long, other]):
            each.order = order
        steps = {
            "decode": (plain, 8192, 4),
            "decode with penalties": (odd, 8192, 4),
            "mixed": ([*plain[:8], long], 200, 4),
            "eager": ([*plain[8:], other], 2000, 2),
        }
        found = {name: launches(runner, gpu, config.cache_specs(), *args) for name, args in steps.items()}
    for name, (counts, host_us) in found.items():
        print(f"{name}: {sum(counts.values())} launches, {host_us:.0f} us of the host: {dict(counts)}")
    total = {name: sum(counts.values()) for name, (counts, _) in found.items()}
    assert total["decode"] <= 12, found["decode"]
    assert total["decode with penalties"] <= total["decode"] + 4
    assert total["mixed"] <= total["decode"] + 2
    assert total["eager"] > 2 * total["mixed"], "a mixed step replays"


class Asking(TorchFunctionMode):
    """Counts what a host learns a number of a GPU by."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.Tensor.cpu, torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.nonzero)
        return function(*args, **kwargs or {})


def test_a_report_of_loads_waits_for_nothing():
    """It comes home with a step's results: a host that waits has no next step ready when this one ends."""
    with FakeLaunches():
        config, runner = build(1, 64, None)
        limits = {"max_num_seqs": MAX_RUNNING, "max_num_batched_tokens": 64, "num_blocks": NUM_BLOCKS}
        served = SchedulerConfig(
            num_ranks=1, max_queued_requests=9, eos_token_ids=(), vocab_size=config.vocab_size, **limits, **SIZES
        )
        scheduler = Scheduler(served, config.cache_specs())
        request = Request(key=1, prompt=np.arange(9, dtype=np.int32), params=SamplingParams(max_tokens=3), seed=1)
        assert scheduler.submit(request, 0.0) is None
        with torch.inference_mode():
            for moe in (layer.moe for layer in runner._model.layers if layer.moe is not None):
                moe.load_E.add_(5)  # of the steps before
        with Asking() as asking:
            launched = runner.launch(scheduler.plan(0.0, report_load=True))
        assert asking.count == 0
        assert launched.finish().expert_load.sum() == 5 * config.num_experts, "one of two layers is sparse"


def test_copies_of_blocks_take_a_launch():
    """One launch copies the blocks of all layers and tensors of a cache; a fork once took two for each of these."""
    copies = {"copy_cache_M": [0, 0], "copy_from_M": [1, 2], "copy_to_M": [3, 4]}
    plan = SimpleNamespace(**{name: np.array(value, np.int32) for name, value in copies.items()})
    with FakeLaunches() as gpu:
        _, runner = build(1, 64, None)
        gpu.take()
        copy_blocks(runner._copies, plan, upload_nowhere)
        assert [(launch.kernel, launch.grid) for launch in gpu.take()] == [("copy_blocks_kernel", (2, 4))]


def test_a_mixed_graph_has_room_for_requests_that_run(monkeypatch):
    """A decode's workspace is as large as the longest request, so there must not be one sequence per token."""
    seen = []
    with FakeLaunches():
        _, runner = build(1, 512, None)
        monkeypatch.setattr(Decoder, "forward", lambda self, batches, caches: seen.extend(batches))
        runner.run_largest_graph(512, MAX_RUNNING)
    [metadata] = [each for batch in seen for each in batch.attention_metadata]
    assert (metadata.max_decodes, metadata.max_prefills, metadata.max_prefill_tokens) == (24, 24, 512)


def test_dummy_steps_have_the_tokens_that_an_exchange_is_told(monkeypatch):
    """All ranks run the same dummy steps. An all-to-all whose host counts rows (`ReferenceAllToAll`, for one) receives from each
    rank as many as it is told, so that other numbers, such as bounds, would let it wait for ever."""
    told, send = [], NvlinkGpuAllToAll.dispatch_send

    def note(self, x_TD, physical_TK, num_tokens_P, num_valid=None):
        told.append((len(x_TD), list(num_tokens_P)))
        return send(self, x_TD, physical_TK, num_tokens_P, num_valid)

    monkeypatch.setattr(NvlinkGpuAllToAll, "graph_safe", False)
    monkeypatch.setattr(NvlinkGpuAllToAll, "dispatch_send", note)
    with FakeLaunches():
        _, runner = build(2, 64, None)
        runner.run_largest_graph(64, MAX_RUNNING)
        runner.run_peak(64, MAX_RUNNING)
        runner.warm_up(64, MAX_RUNNING)
    assert len({num for num, _ in told}) > 5
    assert [(num, num_P) for num, num_P in told if num_P != [num] * 2] == []


def test_the_peak_has_what_sampling_allocates(monkeypatch):
    """Caches get what the largest step leaves; candidates of top-k take twice what logits do, as log-probabilities do."""
    with FakeLaunches():
        config, runner = build(1, 32, None)
        monkeypatch.setattr(
            Decoder, "forward", lambda self, batches, caches: torch.zeros(32, config.hidden_size, dtype=torch.bfloat16)
        )
        with Allocated() as measured:
            runner.run_peak(32, MAX_RUNNING)
        scheduler = Scheduler(
            SchedulerConfig(
                num_ranks=1,
                max_num_seqs=MAX_RUNNING,
                max_num_batched_tokens=32,
                num_blocks=NUM_BLOCKS,
                max_queued_requests=99,
                eos_token_ids=(),
                vocab_size=config.vocab_size,
                **SIZES,
            ),
            config.cache_specs(),
        )
        params = SamplingParams(max_tokens=3, temperature=0.7, top_k=20, top_p=0.9, logprobs=3)
        for key in range(MAX_RUNNING):
            prompt = np.array([key], np.int32)
            assert scheduler.submit(Request(key=key, prompt=prompt, params=params, seed=1), 0.0) is None
        with Allocated() as served:
            step(scheduler, runner, 1)
    logits = 4 * MAX_RUNNING * config.vocab_size
    assert served.peak > 3 * logits
    assert measured.peak >= served.peak - logits / 4, "beside a step's inputs and results"


class Allocated(TorchDispatchMode):
    """The most bytes that tensors made meanwhile have taken at once."""

    def __init__(self):
        super().__init__()
        self._now = self.peak = 0
        self._seen = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        before = {tensor.untyped_storage()._cdata for tensor in tree_leaves(args) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor) or tensor.untyped_storage()._cdata in before | self._seen:
                continue
            storage = tensor.untyped_storage()
            self._seen.add(storage._cdata)
            self._now += storage.nbytes()
            weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
            self.peak = max(self.peak, self._now)
        return out

    def _free(self, data, nbytes):
        self._seen.discard(data)
        self._now -= nbytes


def test_logits_of_a_prompt_come_in_portions(monkeypatch):
    """Check that at most as many rows as requests can run are computed at once, for which memory was measured."""
    rows, logits = [], Decoder.logits
    with FakeLaunches():
        config, runner = build(1, 8192, None)
        monkeypatch.setattr(Decoder, "logits", lambda self, x_XD: (rows.append(len(x_XD)), logits(self, x_XD))[1])
        limits = {
            "max_num_seqs": MAX_RUNNING,
            "max_num_batched_tokens": 8192,
            "num_blocks": NUM_BLOCKS,
            "max_queued_requests": 9,
        }
        served = SchedulerConfig(num_ranks=1, eos_token_ids=(), vocab_size=99, **limits, **SIZES)
        scheduler, prompt = Scheduler(served, config.cache_specs()), np.arange(500, dtype=np.int32) % 50
        params = SamplingParams(max_tokens=1, prompt_logprobs=2)
        assert scheduler.submit(Request(key=1, prompt=prompt, params=params, seed=1), 0.0) is None
        result = runner.launch(scheduler.plan(0.0)).finish()
    assert len(result.prompt_logprob) == 499
    assert result.prompt_top_ids.shape == (2 * 499,)
    assert max(rows) == MAX_RUNNING
    assert sum(rows) == 499 + 1


def test_what_sequences_are_described_by_is_aligned_alike():
    """A pointer that is not a multiple of 16 bytes is another variant of a kernel."""
    sizes = {"max_num_seqs": 3, "max_model_len": 1000, "block_size": 16}
    batch = InputBatch(specs=SPECS, device="cpu", ops=registry.plain(), **sizes)
    tables_CSW = batch.block_tables.index_select(1, torch.tensor([1]))
    behind = attention.prefills(attention.describe([1, 3, 2], [5, 7, 9], tables_CSW[0].expand(3, -1)), 1)
    assert behind.seq_lens.tolist() == [7, 9]
    for tensor in (*tables_CSW, behind.seq_lens, behind.cu_seqlens_q, behind.num_decodes):
        assert tensor.data_ptr() % 16 == 0


def test_a_kernel_that_a_capture_launches_first_is_an_error(monkeypatch):
    """Without a run before the capture, every one of its kernels would be compiled in it."""
    monkeypatch.setattr(FakeCapture, "__call__", FakeCapture.alone)
    with FakeLaunches() as gpu:
        _, runner = build(1, 32, FakeCapture(gpu))
        with pytest.raises(AssertionError, match="prepare_inputs_kernel is compiled during a capture"):
            runner.warm_up(max_num_batched_tokens=32, max_num_seqs=1)
