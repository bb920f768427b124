"""Cascades in the offline API, on the demo tiers: what the client gets, what is logged, and what a replay says."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest
from helpers.conservation import conserved_tokens

import expertwire
from expertwire.deploy.demo_task import make_problem
from expertwire.deploy.demo_verifiers import outcome
from expertwire.strategies.cascade import Cascade, Router
from expertwire.strategies.cascade_log import evaluate_thresholds, reason_at
from expertwire.strategies.cascade_policy import cascade_from_json, cascade_to_json
from expertwire.strategies.decision_log import DecisionLog, read_records

SamplingParams = expertwire.SamplingParams
DEMO = Path(expertwire.__file__).with_name("demo_model")
POLICY = Cascade(small="small", large="large", version="1", random_share=0.0)
NUMBERS = Router(("numbers",), (0.0,), (1.0,), (-1.0,), 4.5)  # below one half with five numbers and more
PROMPTS = [make_problem("SUM", size, seed, "test").prompt for size in range(3, 8) for seed in range(5)]
PARAMS = SamplingParams(temperature=0.7, seed=11)


@pytest.fixture(scope="module")
def models():
    with (
        expertwire.LLM(DEMO.with_name("demo_model_small"), max_model_len=256, threads_per_rank=1) as small,
        expertwire.LLM(DEMO, max_model_len=256, threads_per_rank=1) as large,
    ):
        yield {"small": small, "large": large}


@pytest.fixture(scope="module")
def alone(models):
    """Each model's own outputs."""
    runs = {name: llm.generate(PROMPTS, PARAMS, use_tqdm=False) for name, llm in models.items()}
    return {name: [output.outputs[0] for output in outputs] for name, outputs in runs.items()}


@pytest.fixture(autouse=True)
def _all_tokens_are_counted(models, alone):
    with conserved_tokens(*(llm.stats for llm in models.values())):
        yield


def generate(models, policy, **options):
    with expertwire.CascadeLLM(policy, models, **options) as cascade:
        return cascade.generate(PROMPTS, PARAMS, use_tqdm=False)


def check_outputs(outputs, alone):
    """Check that a cascade returns what the chosen model returns by itself: text, tokens and log-probabilities."""
    for index, output in enumerate(outputs):
        own = alone[output.model][index]
        [got] = output.outputs
        assert (got.token_ids, got.text, got.finish_reason, got.logprobs) == (
            own.token_ids, own.text, own.finish_reason, None,
        )  # fmt: skip


def check_legs(outputs, alone):
    for index, output in enumerate(outputs):
        for leg in output.record.legs:
            whole = len(alone[leg.model][index].token_ids)
            assert leg.tokens == whole if leg.complete else leg.tokens < whole
            assert leg.prompt_tokens == len(output.prompt_token_ids)


def test_a_policy_without_thresholds_keeps_all(models, alone):
    outputs = generate(models, POLICY)
    assert {output.reason for output in outputs} == {"kept"}
    assert all([leg.model for leg in output.record.legs] == ["small"] for output in outputs)
    check_outputs(outputs, alone)
    check_legs(outputs, alone)


def test_the_smallest_doubt_escalates_all_and_stops_the_small_model(models, alone):
    before = [llm.stats()["tokens_sampled"] for llm in models.values()]
    outputs = generate(models, dataclasses.replace(POLICY, confidence_threshold=0.0))
    assert {output.reason for output in outputs} == {"confidence"}
    check_outputs(outputs, alone)
    check_legs(outputs, alone)
    sampled = [llm.stats()["tokens_sampled"] - then for llm, then in zip(models.values(), before, strict=True)]
    whole = sum(len(output.token_ids) for output in alone["small"])
    assert sampled[0] < 0.6 * whole, "the engine of the small model has gone on"
    assert sampled[1] >= sum(len(output.token_ids) for output in alone["large"])


def test_the_router_sends_long_problems_to_the_large_model_at_once(models, alone):
    outputs = generate(models, dataclasses.replace(POLICY, router=NUMBERS, router_threshold=0.5))
    assert [output.reason for output in outputs] == ["kept"] * 10 + ["router"] * 15
    assert all(len(output.record.legs) == 1 for output in outputs)
    check_outputs(outputs, alone)


def test_the_verifier_escalates_what_it_rejects_or_cannot_judge(models, alone):
    policy = dataclasses.replace(POLICY, verifier="exact", verifier_threshold=0.5)
    outputs = generate(models, policy, verifier=outcome)
    right = [own.text.endswith(f"answer {sum(map(int, prompt.split()[1:-1])) % 100}")
             for own, prompt in zip(alone["small"], PROMPTS, strict=True)]  # fmt: skip
    assert [output.reason == "kept" for output in outputs] == right
    assert 0 < sum(right) < len(right)
    check_outputs(outputs, alone)

    def fails(_):
        raise ZeroDivisionError

    outputs = generate(models, policy, verifier=fails)
    assert {output.reason for output in outputs} == {"verifier"}
    assert {output.record.scores["verifier"] for output in outputs} == {None}


def all_mechanisms(share):
    return dataclasses.replace(
        POLICY, router=NUMBERS, router_threshold=0.1, confidence_threshold=-0.6, window=2, random_share=share
    )


def test_the_log_replays_the_run_exactly_and_tells_of_higher_thresholds(models, alone, tmp_path):
    log = tmp_path / "decisions.jsonl"
    outputs = generate(models, all_mechanisms(0.3), verifier=outcome, decision_log=log)
    check_outputs(outputs, alone)
    check_legs(outputs, alone)
    reasons = [output.reason for output in outputs]
    assert set(reasons) == {"kept", "router", "confidence"}
    records, num_wrong = read_records(log)
    assert (records, num_wrong) == ([output.record for output in outputs], 0)
    assert [reason_at(record, record.thresholds) for record in records] == reasons
    assert evaluate_thresholds(records).escalated.value == 1 - reasons.count("kept") / len(reasons)
    sliced = [record for record in records if record.in_random_slice]
    assert 0 < len(sliced) < len(records)
    assert all(leg.complete for record in sliced for leg in record.legs)
    assert all(set(record.outcomes) == {"small", "large"} for record in sliced)
    # With another threshold the run does what the log says it would.
    other = dataclasses.replace(all_mechanisms(0.0), confidence_threshold=-0.2)
    escalated = sum(output.reason != "kept" for output in generate(models, other))
    assert evaluate_thresholds(records, {"confidence": -0.2}).escalated.value == escalated / len(PROMPTS)


def test_statistics_count_what_was_decided(models):
    before = models["small"].stats()["groups"]
    outputs = generate(models, all_mechanisms(0.0))
    after = models["small"].stats()["groups"]
    found = {name: after.get(name, 0) - before.get(name, 0) for name in after if name.startswith("cascade_")}
    reasons = [output.reason for output in outputs]
    legs = [leg for output in outputs for leg in output.record.legs]
    assert found == {
        "cascade_requests": 25, "cascade_kept": reasons.count("kept"), "cascade_random_slice": 0,
        "cascade_escalated_router": reasons.count("router"), "cascade_escalated_confidence": reasons.count("confidence"),
        "cascade_escalated_verifier": 0,
        "cascade_tokens_small": sum(leg.tokens for leg in legs if leg.model == "small"),
        "cascade_tokens_large": sum(leg.tokens for leg in legs if leg.model == "large"),
        "cascade_tokens_verifier": 0,
    } | {name: value for name, value in found.items() if not value}  # fmt: skip


def test_the_models_have_nothing_left(models):
    for llm in models.values():
        stats = llm.stats()
        assert (stats["num_waiting"], llm.frontend.num_open) == (0, 0)


def test_mistakes_are_refused(models, tmp_path):
    make = expertwire.CascadeLLM
    with pytest.raises(ValueError, match="models must have the policy's small and large, got small"):
        make(POLICY, {"small": models["small"]})
    with pytest.raises(ValueError, match="verifier must be given with verifier_threshold"):
        make(dataclasses.replace(POLICY, verifier_threshold=0.5), models)
    with pytest.raises(ValueError, match="cannot be read"):
        make(tmp_path / "none.json", models)
    with pytest.raises(ValueError, match=r"decision_log .* cannot be written"):
        make(POLICY, models, decision_log=tmp_path)
    with pytest.raises(ValueError, match="prompt 0: n must be 1 for a cascade, got 2"):
        make(POLICY, models).generate("SUM 1 2 ?", SamplingParams(n=2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON"), ("[]", "must be an object"), ("{}", "must have the fields small, large, version"),
        ('{"small": "s", "large": "l", "version": "1", "size": 1}', "has the fields small, .*, got size"),
        ('{"small": "s", "large": "l", "version": "1", "router": 5}', "cascade.router must be an object"),
        ('{"small": "s", "large": "l", "version": "1", "router": {"bias": 1}}', "cascade.router must have the fields features"),
        ('{"small": "s", "large": "l", "version": "1", "small_token_cost": -1}', "cascade.small_token_cost"),
        ('{"small": "s", "large": "l", "version": "1", "router": {"features": 1, "means": [], "scales": [], "weights": [],'
         ' "bias": 0}}', "cascade.router.features must be a list"),
    ],
)  # fmt: skip
def test_bad_policies_in_files_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        cascade_from_json(text)


def test_policies_are_json():
    for policy in (POLICY, all_mechanisms(0.1)):
        assert cascade_from_json(cascade_to_json(policy)) == policy


def test_several_writers_share_a_log_and_a_torn_line_costs_itself_only(models, tmp_path):
    path = tmp_path / "log"
    [output] = expertwire.CascadeLLM(POLICY, models).generate("SUM 1 2 ?", PARAMS, use_tqdm=False)
    logs = [DecisionLog(path) for _ in range(4)]
    threads = [threading.Thread(target=lambda log=log: [log.record(output.record) for _ in range(50)]) for log in logs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for log in logs:
        log.close()
    with path.open("a") as file:
        file.write(output.record.to_json()[:40] + "\n")
    assert read_records(path) == ([output.record] * 200, 1)


def test_a_disk_that_is_full_costs_records_and_nothing_else(models, tmp_path):
    [output] = expertwire.CascadeLLM(POLICY, models).generate("SUM 1 2 ?", PARAMS, use_tqdm=False)
    path = tmp_path / "log"
    log = DecisionLog(path)
    path.unlink()
    path.symlink_to("/dev/full")
    for _ in range(3):
        log.record(output.record)
    log.close()
    assert log.num_dropped == 3
