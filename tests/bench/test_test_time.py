"""The study of test-time compute: simulated branches are those of the model, and choices are reported on the other fold."""

from pathlib import Path

import numpy as np
import pytest

from expertwire.bench.demo.accuracy import DEMO_MODEL
from expertwire.bench.test_time import cascade, live, replay
from expertwire.bench.test_time.simulation import simulate
from expertwire.bench.test_time.sources import Asked, Bank, Sampler
from expertwire.bench.test_time.statistics import Runs, choose_for, interval, out_of_sample
from expertwire.deploy import demo_verifiers
from expertwire.deploy.demo_task import check, make_problem
from expertwire.strategies.base import Budget
from expertwire.strategies.beam import BeamSearch
from expertwire.strategies.best_of_n import BestOfN
from expertwire.strategies.step_retries import StepRetries

ASKED = [Asked(make_problem("SUM", 4, seed), seed) for seed in range(6)]


@pytest.fixture(scope="module")
def sampler():
    return Sampler(DEMO_MODEL)


@pytest.fixture(scope="module")
def bank(sampler):
    return Bank.sample(sampler, ASKED, 4)


def test_greedy_texts_are_those_of_transformers(bank):
    transformers = pytest.importorskip("transformers")
    import torch

    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)
    inputs = tokenizer([one.problem.prompt for one in ASKED], return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert [tokenizer.decode(row, skip_special_tokens=True) for row in ids] == bank.texts(-1)


def test_a_bank_replays_what_the_sampler_samples(sampler, bank, tmp_path: Path):
    strategy = BestOfN(4, verifier=demo_verifiers.outcome)
    bank.save(tmp_path / "bank.npz")
    read = Bank.load(tmp_path / "bank.npz", ASKED)
    outcomes = simulate(strategy, ASKED, read, groups_at_once=4)
    assert outcomes == simulate(strategy, ASKED, sampler)
    solved = [any(check(one.problem, read.texts(branch)[i]) for branch in range(4)) for i, one in enumerate(ASKED)]
    assert [each.right for each in outcomes] == solved
    lengths = sum(read.lengths(branch) for branch in range(4))
    assert [each.tokens for each in outcomes] == lengths.tolist()
    assert all(each.branches == 4 and 0 < each.kept < each.tokens for each in outcomes)


def test_step_retries_keep_right_steps_and_their_budget(sampler):
    free = simulate(StepRetries(demo_verifiers.process, ";"), ASKED, sampler)
    assert all(each.right for each in free)
    tight = simulate(StepRetries(demo_verifiers.process, ";", budget=Budget(tokens=12)), ASKED, sampler)
    assert all(each.tokens == 12 and not each.right for each in tight)


def runs(right, tokens):
    return Runs(np.array(right, bool), np.array(tokens, float), np.array(tokens, float))


def test_the_cheapest_choice_that_is_as_good_is_taken():
    dear = runs([1, 1, 1, 1], [9, 9, 9, 9])
    table = {
        "easy": {"dear": dear, "cheap": runs([1, 1, 1, 1], [2, 2, 2, 2])},
        "hard": {"dear": dear, "cheap": runs([0, 0, 0, 0], [2, 2, 2, 2])},
    }
    assert choose_for(table, 1.0) == {"easy": "cheap", "hard": "dear"}
    ours, theirs, choices = out_of_sample(table, "dear")
    assert ours.right.all()
    assert (ours.tokens.mean(), theirs.tokens.mean()) == (5.5, 9)
    assert choices == [{"easy": "cheap", "hard": "dear"}] * 2


def test_a_choice_is_not_judged_on_the_problems_it_was_made_on():
    table = {"bin": {"dear": runs([1, 1] * 2, [9] * 4), "lucky": runs([1, 0] * 2, [2] * 4)}}
    ours, _, choices = out_of_sample(table, "dear")
    assert choices == [{"bin": "dear"}, {"bin": "lucky"}]
    assert ours.right.tolist() == [True, True, False, False]


def test_intervals_are_wilsons():
    low, high = interval(np.array([True] * 90 + [False] * 10))
    assert (low, high) == pytest.approx((0.8256, 0.9448), abs=1e-3)


def test_an_abort_saves_the_rest_of_the_small_tier():
    ones = np.ones(2)
    signal = np.array([[-0.1, -5.0, -0.1, -0.1], [-0.1, -0.1, -0.1, -0.1]])
    legs = cascade.Legs(
        size=3 * ones,
        prompt=0 * ones,
        small=4 * ones,
        large=4 * ones,
        small_right=np.array([False, True]),
        large_right=np.array([True, True]),
        signals={"token": signal},
        ratio=0.5,
    )
    sent = np.zeros(2, bool)
    whole = cascade.run(legs, direct=sent, signal="token", threshold=-1.0, abort=False)
    abort = cascade.run(legs, direct=sent, signal="token", threshold=-1.0, abort=True)
    assert whole.right.all()
    assert abort.escalated.tolist() == [True, False]
    assert whole.cost.tolist() == [1.5, 0.5]
    assert abort.cost.tolist() == [1.25, 0.5]
    direct = cascade.run(legs, direct=~sent, signal=None, threshold=0.0, abort=False)
    assert direct.cost.tolist() == [1.0, 1.0]


def test_a_live_run_is_compared_on_the_same_problems_and_with_best_of_n_at_equal_cost():
    simulated = {
        "greedy": runs([1, 0, 1, 1], [5] * 4),
        "best-of-1": runs([0, 0, 0, 0], [5] * 4),
        "best-of-4": runs([1, 1, 1, 1], [20] * 4),
    }
    tokens = {"greedy": 5, "best-of-1": 5, "best-of-4": 20}
    seconds = {"greedy": 1.0, "best-of-1": 1.0, "best-of-4": 4.0}
    live_runs = [
        {"name": name, "right": run.right[:2].tolist(), "tokens": [tokens[name]] * 2, "wall_s": seconds[name]}
        for name, run in simulated.items()
    ]
    live_runs.append({"name": "greedy", "right": [True, True], "tokens": [10, 10], "wall_s": 4.0})
    good, _, _, bad = live.compare(live_runs, simulated)
    assert good["agrees"] and not bad["agrees"], "greedy answers are right or wrong as the simulated ones are"
    assert (good["accuracy"], good["simulated_accuracy"], good["accuracy_of_all"]) == (0.5, 0.5, 0.75)
    assert bad["best_of_n_at_equal_tokens"] == 0.5, "halfway between 5 and 20 on a logarithmic scale"
    assert bad["best_of_n_at_equal_time"] == 1.0
    assert (bad["wall_ms"], bad["tokens_per_s"]) == (2000.0, 5.0)
    assert live.table({"SUM-5": [good]}).splitlines()[-1].startswith("| SUM-5 | greedy | 0.75 | 0.5 | 0.5 | 5.0 |")


def test_slots_of_pruned_branches_are_used_again(sampler):
    beams = BeamSearch(4, 4, demo_verifiers.process, step_text=";")
    first = simulate(beams, ASKED, sampler)
    assert sampler.num_slots == len(ASKED) * (1 + 4), "a slot for a prompt and four for its beams"
    assert first == simulate(beams, ASKED, sampler, groups_at_once=1), "whatever slots they are in"


def test_the_cascades_log_replays_and_predicts_as_the_runs_are():
    random = np.random.default_rng(0)
    signal = -np.abs(random.normal(0, 0.3, (400, 12)))
    signal[:, :3] = cascade.NEVER
    tokens, right = np.full(400, 12.0), np.ones(400, bool)
    legs = cascade.Legs(
        size=tokens, prompt=tokens, small=tokens, large=tokens, small_right=right, large_right=right,
        signals={"window of 4": signal}, ratio=0.1,
    )  # fmt: skip
    result = replay.check(legs, -0.6, (-0.5, -0.7), share=0.5, slices=8)
    assert result["replay_equals_run"]
    higher, lower = result["predictions"]
    assert 0 < result["escalated"] < higher["true"] == higher["predicted"]
    assert higher["exact"] and not lower["exact"]
    assert 0 < lower["true"] < result["escalated"]
    assert abs(lower["true"] - lower["predicted"]) <= lower["largest_error"] < 0.08
    assert (higher["largest_error"], higher["interval"]) == (0, [higher["true"]] * 2)
    assert 0 < lower["root_mean_square_error"] <= lower["largest_error"]
    assert lower["intervals_with_the_true_share"] >= 6 / 8, "of 95 %"
