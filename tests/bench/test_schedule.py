"""`bench schedule`: simulations end and can be repeated, a log is replayed and its flaws are found, reports are complete."""

from __future__ import annotations

import argparse
import functools
import gzip
import itertools
import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from expertwire.bench.scheduler import cost as schedule_cost
from expertwire.bench.scheduler import load_balancing, timeline
from expertwire.bench.scheduler import peer as schedule_peer
from expertwire.bench.scheduler import run as schedule
from expertwire.bench.scheduler.log import replay
from expertwire.bench.scheduler.simulation import EOS, LEFT, Simulation, StepModel
from expertwire.bench.scheduler.traces import TRACES, Lengths, Poisson
from expertwire.scheduler.config import SchedulerConfig
from expertwire.scheduler.outputs import FinishReason

SHORT = {
    "prompt": Lengths(median=40, sigma=0.8, high=200),
    "output": Lengths(median=12, sigma=0.8, high=40),
    "max_model_len": 1024,
    "vocab_size": 500,
}


def config(**changes) -> SchedulerConfig:
    sizes = {
        "num_ranks": 2,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "max_model_len": 1024,
        "block_size": 16,
        "num_blocks": 400,
        "max_queued_requests": 1000,
        "eos_token_ids": (EOS,),
        "vocab_size": 500,
    }
    return SchedulerConfig(**{**sizes, **changes})


def simulate(trace: Poisson, overlap=True, record=None, balancing=None, **changes) -> Simulation:
    simulation = Simulation(
        trace,
        config(**changes),
        model=StepModel(),
        overlap=overlap,
        policy="fcfs",
        record=record,
        balancing=balancing,
    )
    simulation.run()
    return simulation


def short(name: str, num_requests: int = 40, **more) -> Poisson:
    special = {
        "long-context": {"long": Lengths(median=400, sigma=0.3, high=600)},
        "tenants": {"system_tokens": 32},
        "multi-turn": {"system_tokens": 64, "user": Lengths(median=20, sigma=0.5, high=60)},
    }
    return TRACES[name](num_requests=num_requests, **{**SHORT, **special.get(name, {}), **more})


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("name", TRACES)
def test_every_request_is_answered_to_its_end(name, overlap):
    outcome = simulate(short(name), overlap).outcome
    assert len(outcome.arrivals) == 40
    for arrival, row in zip(outcome.arrivals, outcome.served, strict=True):
        assert row["count"] == arrival.output_len
        by_itself = arrival.output_len < arrival.max_tokens
        assert row["finish"] == (FinishReason.STOP if by_itself else FinishReason.LENGTH)
        assert arrival.time <= row["submitted"] < row["first"] <= row["last"]


def test_a_pool_too_small_preempts_and_answers_the_same():
    trace = short("poisson", rate=1000.0, output=Lengths(median=120, sigma=0.5, high=200))
    large, small = simulate(trace), simulate(trace, num_blocks=27)
    assert large.ranks.preemptions == 0
    assert small.ranks.preemptions > 0
    assert np.array_equal(large.outcome.served["count"], small.outcome.served["count"])


def test_clients_that_leave_are_neither_served_nor_counted():
    simulation = simulate(short("poisson", rate=200.0, abort_share=0.5, patience_s=0.1))
    rows = simulation.outcome.served
    gone = rows["finish"] == LEFT
    assert 5 < gone.sum() < 25
    result = schedule.report(simulation, 100.0, 100.0)
    assert result["aborted"] == gone.sum()
    assert result["finished"] == 40 - gone.sum()
    assert result["goodput"]["share"] == 1.0


def test_a_step_takes_as_long_as_the_slowest_rank():
    outcome = simulate(short("poisson")).outcome
    starts, seconds = np.array(outcome.start), np.array(outcome.seconds)
    assert np.allclose(seconds, np.max(outcome.rank_s, axis=1))
    assert (starts[1:] >= (starts + seconds)[:-1] - 1e-9).all(), "steps do not run at the same time"
    model = StepModel(base_s=1.0, token_s=0.5, kv_token_s=0.25)
    assert model.seconds_P(np.array([2, 0]), np.array([4, 0])).tolist() == [3.0, 1.0]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_prefix_hits_are_at_most_those_of_unlimited_memory(num_ranks):
    trace = short("multi-turn", 60, rate=4.0)
    prefix = schedule.report(simulate(trace, num_ranks=num_ranks), 1.0, 1.0)["prefix"]
    assert 0 < prefix["cached_tokens"] <= prefix["oracle_tokens"] < prefix["prompt_tokens"]
    if num_ranks == 1:  # where no request can be placed away from its prefix
        assert prefix["cached_tokens"] >= 0.95 * prefix["oracle_tokens"]
    without = schedule.report(simulate(trace, num_ranks=num_ranks, enable_prefix_caching=False), 1.0, 1.0)["prefix"]
    assert without["cached_tokens"] == 0


def test_round_robin_and_least_requests():
    tokens, running_P, admitted_P = np.array([5, 900]), np.array([3.0, 2.0]), np.array([7, 9])
    for make, expected in ((load_balancing.RoundRobin, admitted_P), (load_balancing.LeastRequests, running_P)):
        rule = make()
        assert rule.credit is None, "prefixes do not matter"
        assert rule.load(tokens, 0 * tokens, tokens).tolist() == [1.0, 1.0]
        assert rule.load_P(running_P, admitted_P) is expected


def test_sessions_stay_with_their_prefixes_and_steps_are_shorter_for_it():
    trace = short("multi-turn", 120, rate=60.0, think_s=0.5)
    runs = {
        name: schedule.report(simulate(trace, num_ranks=4, balancing=make()), 1.0, 1.0)
        for name, make in load_balancing.RULES.items()
    }
    hits = {name: run["prefix"]["cached_tokens"] / run["prefix"]["spread_oracle_tokens"] for name, run in runs.items()}
    assert hits["least-loaded"] > 0.95, hits
    assert max(hits["round-robin"], hits["least-requests"]) < 0.8, hits
    steps = {name: run["step_ms"]["mean"] for name, run in runs.items()}
    assert steps["least-loaded"] < min(steps["round-robin"], steps["least-requests"]), steps


def test_load_balancing_rules_are_compared_on_equal_requests(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(schedule, "TRACES", {name: functools.partial(short, name) for name in TRACES})
    monkeypatch.setattr(load_balancing, "SECONDS", 1.0)
    monkeypatch.setattr(load_balancing, "LOADS", {"light": 10.0})
    files = [tmp_path / "first", tmp_path / "again"]
    for file in files:
        assert schedule.main(command("--load-balancing", "2", "1", "--blocks", "4000", "--json", str(file))) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * (1 + 2 * len(TRACES) * 3)
    first, again = (json.loads(file.read_text())["runs"] for file in files)
    assert first == again
    for rules in zip(*[iter(first)] * 3, strict=True):
        assert [run["rule"] for run in rules] == list(load_balancing.RULES)
        assert len({(run["trace"], run["ranks"], run["requests"], run["finished"]) for run in rules}) == 1
        if rules[0]["ranks"] == 1:  # where there is nothing to choose
            assert len({run["ttft_ms"]["p99"] for run in rules}) == 1


def test_a_run_can_be_repeated():
    trace = short("multi-turn")
    first, again = (schedule.report(simulate(trace), 0.1, 0.02) for _ in range(2))
    assert first.pop("host_us_per_step") > 0
    assert again.pop("host_us_per_step") > 0
    assert first == again


def test_goodput_counts_what_met_both_targets():
    simulation = simulate(short("bursty", 60, rate=200.0))
    rows = simulation.outcome.served
    ttft = rows["first"] - [arrival.time for arrival in simulation.outcome.arrivals]
    middle = float(np.median(ttft))
    result = schedule.report(simulation, middle, 100.0)
    assert result["goodput"]["share"] == pytest.approx(np.mean(ttft <= middle))
    assert result["goodput"]["tokens_per_s"] < result["output_tokens_per_s"]
    assert schedule.report(simulation, 1e9, 1e-9)["goodput"]["share"] == np.mean(rows["count"] == 1)
    assert json.loads(json.dumps(result)) == result
    assert "goodput" in schedule.table(result)


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "calls.jsonl"
    simulate(short("poisson", rate=100.0, abort_share=0.2, patience_s=0.2), record=path)
    return path


def tamper(path, call: str, change) -> None:
    """Apply `change` to the tenth such call."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change([line for line in lines if line.get("call") == call and line.get("plan", line)][9])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_replay_gives_the_same_plans(log, tmp_path):
    done = replay(log)
    assert done.difference is None
    assert done.plans > 40
    packed = tmp_path / "calls.jsonl.gz"
    packed.write_bytes(gzip.compress(log.read_bytes()))
    assert replay(packed) == done


@pytest.mark.parametrize(
    ("call", "change", "said"),
    [
        ("submit", lambda line: line["request"]["params"].update(max_tokens=1), "differs in num_tokens_P"),
        ("submit", lambda line: line["request"].update(seed=1 << 40), "differs in admit_sampling_A"),
        ("submit", lambda line: line.update(code="RESOURCE_EXHAUSTED"), "was answered RESOURCE_EXHAUSTED, now None"),
        ("plan", lambda line: line["plan"].update(block_id_B="0" * 16), "differs in block_id_B"),
        ("plan", lambda line: line.update(plan=None), "there was no plan"),
        ("commit", lambda line: line.update(results=line["results"][:1]), "the call fails: AssertionError"),
    ],
)
def test_a_log_that_was_tampered_with_is_caught(log, call, change, said):
    tamper(log, call, change)
    difference = replay(log).difference
    assert difference is not None
    assert said in difference, difference


def test_a_file_that_is_no_log_is_refused(tmp_path):
    path = tmp_path / "other"
    path.write_text('{"format": 0}\n')
    with pytest.raises(ValueError, match="not a log"):
        replay(path)
    path.write_text("hello\n")
    with pytest.raises(ValueError, match="line 1"):
        replay(path)


def rank_labels(figure):
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def test_timeline_shows_every_rank():
    pytest.importorskip("matplotlib")
    outcome = simulate(short("poisson"), num_ranks=3).outcome
    figure = schedule.picture(outcome, "40 requests & 3 ranks")
    areas = {area.get_gid() for area in figure.axes[0].collections if area.get_gid()}
    assert areas == {f"rank-{rank}-{kind}" for rank in range(3) for kind in timeline.COLOURS}
    assert [label.partition(":")[0] for label in rank_labels(figure)] == ["rank 0", "rank 1", "rank 2"]
    assert figure.axes[0].get_title() == "40 requests & 3 ranks"
    assert figure.axes[0].get_xlabel() == "seconds"


def test_timeline_puts_time_where_it_was():
    pytest.importorskip("matplotlib")
    shares = {
        "prefill": np.array([[1.0, 0.0], [0.0, 0.0]]),
        "decode": np.array([[0.0, 0.5], [1.0, 0.0]]),
        "idle": np.array([[0.0, 0.5], [0.0, 1.0]]),
    }
    start, seconds = np.array([0.0, 3.0]), np.array([1.0, 1.0])  # two seconds without a step between
    labels = rank_labels(timeline.timeline(shares, start, seconds, ""))
    assert labels == ["rank 0: 25.0%, 25.0%, 0.0%", "rank 1: 0.0%, 12.5%, 37.5%"]


def command(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    schedule.add_arguments(parser)
    return parser.parse_args(arguments)


def test_the_command_reports_records_draws_and_replays(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = {name: tmp_path / name for name in ("json", "timeline", "record")}
    load = [
        "--requests",
        "8",
        "--rate",
        "50",
        "--ranks",
        "2",
        "--running",
        "16",
        "--trace",
        "tenants",
        "--scheduling-policy",
        "fair",
    ]
    options = [word for name, file in files.items() for word in (f"--{name}", str(file))]
    assert schedule.main(command(*load, *options)) == 0
    assert "goodput" in capsys.readouterr().out
    result = json.loads(files["json"].read_text())
    assert result["finished"] == 8
    assert result["options"]["scheduling_policy"] == "fair"
    ElementTree.fromstring(files["timeline"].read_text())
    assert schedule.main(command("--replay", str(files["record"]))) == 0
    assert "all the same" in capsys.readouterr().out
    tamper(files["record"], "plan", lambda line: line["plan"].update(step="0" * 16))
    assert schedule.main(command("--replay", str(files["record"]))) == 1
    assert "differs in step" in capsys.readouterr().out


def test_the_command_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="--json: there is no folder"):
        schedule.main(command("--json", "/no/such/folder/file"))
    with pytest.raises(ValueError, match="scheduling_policy must be one of"):
        schedule.main(command("--scheduling-policy", "best"))
    with pytest.raises(ValueError, match="is no checkout of nano-vllm"):
        schedule.main(command("--peer", "/no/such/folder"))
    with pytest.raises(ValueError, match="none of the 3 requests was served"):
        schedule.main(command("--requests", "3", "--blocks", "2"))


def test_the_cost_is_measured_under_the_load_that_it_names(monkeypatch):
    monkeypatch.setattr(schedule_cost, "WARM_UP", 20)
    result = schedule_cost.cost(2, 64, 100)
    assert result["slots_taken"] > 0.9
    assert result["turnover"] >= 0.005
    assert result["steps_with_chunks"] > 0
    assert 0.05 < result["prefix_hits"] < 0.4
    parts = result["cpu_us"]
    assert set(parts) == {"total", *schedule_cost.PARTS}
    assert all(0 < figures["p50"] <= figures["p99"] for figures in parts.values())
    assert sum(parts[name]["mean"] for name in schedule_cost.PARTS[:-1]) == pytest.approx(parts["total"]["mean"])
    assert result["plan_bytes"]["p50"] > 1000
    assert "slots taken" in schedule_cost.table(result)


PEER = {
    "sampling_params.py": """
from dataclasses import dataclass
@dataclass
class SamplingParams:
    max_tokens: int
    ignore_eos: bool
""",
    "engine/sequence.py": """
class Sequence:
    block_size = 0
    def __init__(self, tokens, params):
        self.tokens, self.left = tokens, params.max_tokens
    is_finished = property(lambda self: self.left == 0)
""",
    "engine/scheduler.py": """
from nanovllm.config import Config
from nanovllm.engine.sequence import Sequence
class Scheduler:
    def __init__(self, config: Config):
        self.running, self.block_size = [], config.kvcache_block_size
    def add(self, sequence):
        assert Sequence.block_size == self.block_size
        self.running.append(sequence)
    def schedule(self):
        return list(self.running), False
    def postprocess(self, sequences, tokens, is_prefill):
        assert len(tokens) == len(sequences) and not is_prefill
        for sequence in sequences:
            sequence.left -= 1
        self.running = [sequence for sequence in self.running if not sequence.is_finished]
""",
}


def test_a_peer_is_driven_under_the_same_load(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule_cost, "WARM_UP", 5)
    monkeypatch.setattr(schedule_peer, "WARM_UP", 5)
    (tmp_path / "nanovllm" / "engine").mkdir(parents=True)
    (tmp_path / "nanovllm" / "__init__.py").write_text("raise ImportError('imports a model')")
    for name, text in PEER.items():
        (tmp_path / "nanovllm" / name).write_text(text)
    result = schedule_peer.compare(tmp_path, sizes=(32,), steps=4, rounds=3)
    assert [row["who"] for row in result["rows"]] == ["ours, blocks of 16", "peer, blocks of 256", "peer, blocks of 16"]
    for row in result["rows"]:
        assert row["running"] == 32
        assert row["us"] == np.median([us for us, _ in row["rounds"]]) > 0
    assert len(schedule_peer.table(result).splitlines()) == 6


def test_a_session_waits_for_its_answers():
    """The next turn is asked after the answer to the one before, and a session's turns are in order."""
    simulation = simulate(short("multi-turn", 30))
    by_session: dict[int, list] = {}
    for arrival, row in zip(simulation.outcome.arrivals, simulation.outcome.served, strict=True):
        by_session.setdefault(arrival.session, []).append((arrival, row))
    assert len(by_session) == 6
    for turns in by_session.values():
        assert [arrival.turn for arrival, _ in turns] == [0, 1, 2, 3, 4]
        for (_, row), (later, _) in itertools.pairwise(turns):
            assert later.time > row["last"]
