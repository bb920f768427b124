"""A rank on a GPU from its first message to its first token, with the GPU's kernels, interpreted: it looks at its device, checks
what will fit, loads, runs its largest step, sizes and allocates the caches, captures, and serves."""

import pytest
from helpers import tiny_checkpoints
from helpers.fake_cuda import FakeCuda
from helpers.fake_graphs import FakeCapture
from helpers.gpu_ranks import install, serve

from expertwire.comm.all_to_all.base import RankStalled
from expertwire.comm.all_to_all.local import LocalAllToAll
from expertwire.comm.control.channel import RankError
from expertwire.engine import worker
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.kv_cache import memory_plan
from expertwire.engine.loader import rank_model
from expertwire.engine.models.decoder import Decoder
from expertwire.engine.runner.model_runner import ModelRunner


def seen(monkeypatch, owner, name, done, what):
    """Write down, when `owner.name` is called, `what(*args)`."""
    real = getattr(owner, name)

    def called(*args, **kwargs):
        done.append(what(*args, **kwargs))
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, called)


@pytest.fixture
def done(monkeypatch):
    """Record what has been done, in order."""
    done = []
    seen(monkeypatch, memory_plan, "check", done, lambda plan: "check")
    seen(monkeypatch, rank_model, "load_model", done, lambda *args, **kwargs: "load")
    seen(monkeypatch, ModelRunner, "run_peak", done, lambda self, *sizes: ("largest step", *sizes))
    seen(monkeypatch, Decoder, "allocate", done, lambda self, **sizes: ("caches", sizes["num_blocks"]))
    seen(monkeypatch, ModelRunner, "warm_up", done, lambda self, *sizes: "warm up")
    return done


def test_one_rank_reaches_its_first_token(monkeypatch, done):
    memory = install(monkeypatch, FakeCuda(1))
    monkeypatch.setattr(worker.cuda_graphs, "cuda", lambda *given, **options: FakeCapture())
    folder = tiny_checkpoints.cached("qwen3_moe", num_hidden_layers=2)
    config = EngineConfig(
        model=str(folder), dtype="float32", device="cuda", max_num_batched_tokens=2, max_num_seqs=1, max_model_len=64,
        threads_per_rank=1,
    )  # fmt: skip
    prompt = tiny_checkpoints.safe_prompt(folder, 3, seed=1)
    served = serve(config, [0], [prompt, prompt], memory)
    assert not served.errors, served.errors[0]
    assert done == [
        "check", "load", ("caches", [2]), ("largest step", 2, 1),
        ("caches", [served.info.cache_blocks["full"]]), "warm up",
    ]  # fmt: skip
    assert served.info.device == "cuda"
    assert served.info.cache_tokens == 64, "there is room for all that can run"
    assert served.tokens[0] == served.tokens[1]


def test_a_rank_that_stalls_while_others_warm_up_is_named_before_anyone_is_served(monkeypatch, done):
    def check(self):
        raise RankStalled(1, 1, "dispatch", None, 108.0)

    memory = install(monkeypatch, FakeCuda(1))
    monkeypatch.setattr(LocalAllToAll, "check", check, raising=False)
    seen(monkeypatch, ModelRunner, "launch", done, lambda self, plan: "launch")
    folder = tiny_checkpoints.cached("qwen3_moe", num_hidden_layers=2)
    config = EngineConfig(
        model=str(folder), dtype="float32", device="cuda", max_num_batched_tokens=2, max_num_seqs=1, max_model_len=64,
        threads_per_rank=1,
    )  # fmt: skip
    with pytest.raises(RankError, match="rank 1 has stalled"):
        serve(config, [0], [tiny_checkpoints.safe_prompt(folder, 3, seed=1)], memory)
    assert done[-1] == ("largest step", 2, 1)
