"""`python -m expertwire.bench.serving.peers`: when prefill ends, and measurements that fail."""

import json
import subprocess
import sys

import numpy as np
import pytest
from helpers import fake_frontend

from expertwire.bench.serving import peers
from expertwire.bench.serving.peers import Stopwatch, Times
from expertwire.engine.frontend.api import RequestError


@pytest.fixture
def clock(monkeypatch):
    """Every look at the clock is a second later."""
    seconds = iter(range(100))
    monkeypatch.setattr(Times, "now", classmethod(lambda cls: cls(next(seconds), 0)))
    return seconds


def test_decode_begins_when_the_last_sequence_has_its_first_token(clock):
    watch = Stopwatch(2)
    watch.arrived([0])
    watch.arrived([0, 0])
    next(clock)
    watch.arrived([0, 1, 1])  # prefill ends; what came with the token that ends it is not decode
    next(clock)
    next(clock)
    watch.arrived([0, 1, 1])
    prefill, decode = watch.stop()
    assert (prefill.processor, decode.processor, watch.decoded) == (2, 3, 3)


class Frontend(fake_frontend.FakeFrontend):
    """Gives every open request a token a poll, the later ones after the earlier."""

    def __init__(self):
        super().__init__()
        self.polls, self.given = 0, {}

    def poll(self, timeout_s):
        self.polls += 1
        for request in [request for request in self._requests if not request.done and request.id < self.polls]:
            self.given[request.id] = self.given.get(request.id, 0) + 1
            last = self.given[request.id] == self.submitted[request.id][1].max_tokens
            self.push(request.id, token_ids=(7,), finish_reason="length" if last else None)
        return super().poll(timeout_s)


def test_tokens_of_a_frontend_are_counted(clock):
    watch = Stopwatch(3)
    peers.generate(Frontend(), np.full((3, 4), 9), 5, watch)
    watch.stop()
    assert watch.decoded == 15 - (3 + 2 + 1)  # those of the first three polls are prefill


def test_a_generation_that_arrived_at_once_is_timed_again(clock):
    found = [[0, 0, 0], [0, 0, 0], [0]]

    def generate(watch):
        watch.arrived(found.pop(0))
        if not found:
            watch.arrived([0, 0])

    prefill, decode, num_decoded = peers.time_generation(generate, 1)
    assert (prefill.processor, decode.processor, num_decoded) == (1, 1, 2)
    found += [[0, 0, 0]] * 10
    with pytest.raises(RuntimeError, match="all tokens arrived at once, 5 times: generate more of them"):
        peers.time_generation(generate, 1)


def test_a_refused_prompt_is_raised():
    frontend = fake_frontend.FakeFrontend()
    frontend.poll = lambda _: [type("Update", (), {"error": RequestError("INVALID_ARGUMENT", "no room")})]
    with pytest.raises(ValueError, match="no room"):
        peers.generate(frontend, np.full((1, 4), 9), 5, Stopwatch(1))


def test_a_measurement_that_fails_does_not_end_the_others(monkeypatch, tmp_path, capsys):
    really = subprocess.run

    def run(command, **options):
        if "--one" not in command:
            return really(command, **options)
        engine = command[command.index("--one") + 1]
        if engine == "expertwire":
            return subprocess.CompletedProcess(command, 0, json.dumps({"decode": 2.0, "prefill": 3.0, "peak_mib": 4.0}))
        raise subprocess.CalledProcessError(-9, command)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(peers, "make_checkpoints", lambda *_: None)
    file = tmp_path / "found.json"
    engines = ["--engines", "transformers eager", "expertwire", "--dtypes", "float32", "--batches", "1"]
    options = ["--models", "nemotron-h", "qwen3-next", *engines, "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["peers", *options])
    assert peers.main() == 1
    rows = json.loads(file.read_text())["rows"]
    assert [(row["model"], row["engine"], row.get("decode")) for row in rows] == [
        (model, engine, speed)
        for model in ("nemotron-h", "qwen3-next")
        for engine, speed in (("transformers eager", None), ("expertwire", 2.0))
    ]
    assert "died with" in rows[0]["samples"][0]["error"]
    assert capsys.readouterr().out.count("failed") == 2
