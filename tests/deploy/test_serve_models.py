"""`expertwire serve --models`: several engines behind one port, their options and shares, and the death of one."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import expertwire
from expertwire.deploy.cli import make_parser
from expertwire.deploy.grpc.client import Client, ServerError
from expertwire.deploy.model_options import engine_configs

DEMO = Path(expertwire.__file__).with_name("demo_model")
MODELS = f"small={DEMO.with_name('demo_model_small')},large={DEMO}"


def parsed(*arguments: str) -> argparse.Namespace:
    return make_parser(benches=()).parse_args(["serve", *arguments])


def test_options_are_for_all_models_or_for_one():
    small, large = engine_configs(
        parsed("--models", MODELS, "--max-num-seqs", "7", "--model-options", "large.ep-size=2",
               "--model-options", "large.max_num_seqs=9", "--model-options", "small.enable-prefix-caching=false")
    )  # fmt: skip
    assert [(each.served_model_name, each.ep_size, each.max_num_seqs) for each in (small, large)] == [
        ("small", 1, 7),
        ("large", 2, 9),
    ]
    assert (small.enable_prefix_caching, large.enable_prefix_caching) == (False, True)
    assert (small.model, large.model) == (str(DEMO.with_name("demo_model_small")), str(DEMO))


def test_shares_divide_cores_and_the_memory_of_gpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    options = ("--models", MODELS, "--shares", "small=1,large=3", "--model-options", "large.ep-size=2")
    small, large = engine_configs(parsed(*options, "--gpu-memory-utilization", "0.8"))
    assert (small.threads_per_rank, large.threads_per_rank) == (4, 6)
    assert (small.gpu_memory_utilization, large.gpu_memory_utilization) == (0.8, 0.8), "as given"
    small, large = engine_configs(parsed(*options, "--threads-per-rank", "3"))
    assert (small.threads_per_rank, large.threads_per_rank) == (3, 3), "as given"
    # The second engine finds what the first one has taken.
    assert (small.gpu_memory_utilization, large.gpu_memory_utilization) == pytest.approx((0.225, 0.9))
    assert [each.threads_per_rank for each in engine_configs(parsed("--models", MODELS))] == [8, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--models", "small"), "--models must be NAME=VALUE"), (("--models", "a=1,a=2"), "different names"),
        (("--models", MODELS, "model"), "MODEL must not be given with --models"),
        (("--models", MODELS, "--served-model-name", "x"), "--served-model-name must not be given"),
        (("--models", MODELS, "--model-options", "medium.ep-size=2"), "one of small, large, got 'medium.ep-size=2'"),
        (("--models", MODELS, "--model-options", "large.size=2"), "large.size: unrecognized arguments"),
        (("--models", MODELS, "--model-options", "large.ep-size=two"), "large.ep-size: argument --ep-size: invalid int"),
        (("--models", MODELS, "--model-options", "large.served-model-name=x"), "the name is 'large'"),
        (("--models", MODELS, "--shares", "small=1"), "a number > 0 for each of small, large"),
        (("--models", MODELS, "--shares", "small=1,large=0"), "a number > 0"),
        (("--models", MODELS, "--shares", "small=1,large=1,medium=1"), "a number > 0"),
        (("--shares", "small=1"), "--shares needs --models"), (("--model-options", "a.b=1"), "--model-options needs --models"),
    ],
)  # fmt: skip
def test_mistakes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        engine_configs(parsed(*arguments))


@contextlib.contextmanager
def serve(*options):
    command = [sys.executable, "-m", "expertwire.deploy.cli", "serve", "--port", "0", "--models", MODELS, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("serving small, large on ")
        yield process, line.split()[-1]
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_requests_name_a_model_and_one_that_dies_leaves_the_others():
    with (
        serve("--load-format", "mock", "--mock-step-time", "0.02", "--model-options", "large.max-num-seqs=3") as (
            process,
            address,
        ),
        Client(address) as client,
    ):
        assert client.models() == {"small": "", "large": ""}
        assert client.model_info()["name"] == client.model_info("small")["name"] == "small"
        assert client.model_info("large")["max_num_seqs"] == 3
        tokens = {
            name: len(list(client.generate([5, 6], max_tokens=4, ignore_eos=True, model=name)))
            for name in ("", "small", "large")
        }
        assert all(tokens.values())
        assert [client.stats(name)["tokens_sampled"] for name in ("small", "large")] == [8, 4]
        assert client.tokenize("SUM 1 ?", model="large") == client.tokenize("SUM 1 ?")
        for call in (lambda: list(client.generate([5], model="medium")), lambda: client.stats("medium")):
            with pytest.raises(ServerError, match="model must be one of small, large, got 'medium'") as raised:
                call()
            assert raised.value.code == "NOT_FOUND"
        with client.session(model="large") as session:
            refused = session.submit([5], max_tokens=2, model="small")
            served = session.submit([5], max_tokens=2, ignore_eos=True)
            assert [chunk for request, chunk in session if request is served]
            assert "model must be that of the session, 'large'" in str(refused.error)
        # The first engine's processes have started first.
        children = sorted(psutil.Process(process.pid).children(), key=lambda each: each.create_time())
        endless = iter(client.generate([5], max_tokens=1900, ignore_eos=True, model="small"))
        next(endless)
        children[0].send_signal(signal.SIGKILL)
        with pytest.raises(ServerError, match="controller") as raised:
            list(endless)
        assert raised.value.code == "UNAVAILABLE"
        until(lambda: client.models()["small"])
        assert client.models()["large"] == ""
        assert list(client.generate([5], max_tokens=3, ignore_eos=True, model="large"))
        assert client.is_serving()
        with pytest.raises(ServerError, match="controller"):
            list(client.generate([5], model="small"))
        assert process.poll() is None
        children[2].send_signal(signal.SIGKILL)
        assert process.wait(60) == 1, "without any engine it ends as with one that has failed"
