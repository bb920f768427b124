import gc
from dataclasses import fields, replace

import numpy as np
import pytest
from helpers.sim_ranks import CACHES, SimCluster, check, expected_output, make_config, make_request

from expertwire.scheduler.outputs import FinishReason
from expertwire.scheduler.plan import StepPlan
from expertwire.scheduler.policy import Policy
from expertwire.scheduler.scheduler import Scheduler


def run(config, *requests):
    cluster = SimCluster(config)
    cluster.submit(*requests)
    cluster.drain()
    return cluster


def first_with(finish, at_least=1, config=None, **params):
    """Return a request whose expected output ends with `finish` after `at_least` tokens or more."""
    for key in range(10_000):
        request = make_request(key, **params)
        output, reason = expected_output(request, config or make_config())
        if reason == finish and len(output) >= at_least:
            return request, output
    raise AssertionError("no such request")


def same(a: StepPlan, b: StepPlan) -> bool:
    return all(np.array_equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(StepPlan))


def test_one_request_step_by_step():
    config = make_config(num_ranks=1, max_num_batched_tokens=4)
    cluster = SimCluster(config)
    cluster.submit(make_request(3, length=6, max_tokens=3, ignore_eos=True))
    steps = [(cluster.plan(), cluster.commit()) for _ in range(4)]
    plans, outputs = zip(*steps, strict=True)
    assert [plan.sched_start_S.tolist() for plan in plans] == [[0], [4], [6], [7]]
    assert [plan.sched_num_S.tolist() for plan in plans] == [[4], [2], [1], [1]]
    assert [plan.sched_sample_S.tolist() for plan in plans] == [[0], [1], [1], [1]]
    assert [plan.block_index_B.tolist() for plan in plans] == [[0, 0], [1, 1], [], []]
    assert [plan.block_cache_B.tolist() for plan in plans] == [[0, 1], [0, 1], [], []]
    assert [plan.step for plan in plans] == [0, 1, 2, 3]
    assert [output.finish_O.tolist() for output in outputs] == [[], [0], [0], [FinishReason.LENGTH]]
    assert not cluster.scheduler.idle
    release = cluster.plan()
    assert release.release_slot.tolist() == [0]
    assert release.num_tokens_P.tolist() == [0]
    cluster.commit()
    assert cluster.scheduler.idle
    assert cluster.plan() is None


@pytest.mark.parametrize("budget", [1, 2, 3, 7, 100])
def test_chunks_and_company_do_not_change_the_output(budget):
    config = make_config(max_num_batched_tokens=budget, max_num_seqs=4, num_blocks=40)
    requests = [make_request(key, length=1 + 5 * key % 23, max_tokens=1 + key % 9) for key in range(12)]
    cluster = run(config, *requests)
    for request in requests:
        check(cluster, request)


def test_eos_ends_an_output_and_counts_as_one_of_its_tokens():
    request, output = first_with(FinishReason.STOP, at_least=3, max_tokens=20)
    cluster = run(make_config(), request)
    assert cluster.tokens[request.key] == output
    assert output[-1] in (0, 1)


def test_ignore_eos():
    stopped, output = first_with(FinishReason.STOP, at_least=2, max_tokens=20)
    request = make_request(stopped.key, max_tokens=20, ignore_eos=True)
    cluster = run(make_config(), request)
    assert len(cluster.tokens[request.key]) == 20
    assert cluster.tokens[request.key][: len(output)] == output


def test_stop_token_ids():
    free, output = first_with(FinishReason.LENGTH, max_tokens=10)
    stop = output[4]
    cluster = run(make_config(), make_request(free.key, max_tokens=10, stop_token_ids=[49, stop]))
    assert cluster.tokens[free.key] == output[: output.index(stop) + 1]
    assert cluster.finish[free.key] == FinishReason.STOP


def test_min_tokens_bans_the_ids_and_stops_after_them():
    short, output = first_with(FinishReason.STOP, max_tokens=20)
    request = make_request(short.key, max_tokens=20, min_tokens=len(output) + 1, stop_token_ids=[7])
    cluster = SimCluster(make_config())
    cluster.submit(request)
    assert cluster.plan().admit_bans.tolist() == [0, 1, 7]
    cluster.commit()
    cluster.drain()
    expected = expected_output(request, make_config())
    assert (cluster.tokens[request.key], cluster.finish[request.key]) == expected
    assert len(expected[0]) > len(output)


def test_a_stop_before_min_tokens_does_not_count():
    request = make_request(0, max_tokens=6, min_tokens=4, stop_token_ids=[9])
    scheduler = Scheduler(make_config(num_ranks=1), CACHES)
    assert scheduler.submit(request, 0.0) is None
    cluster = SimCluster(make_config(num_ranks=1))
    finishes = []
    for _ in range(4):
        plan = scheduler.plan(0.0)
        result = cluster.ranks[0].run(plan)
        outputs = scheduler.commit(plan, [replace(result, token_O=np.full_like(result.token_O, 9))], 0.0)
        finishes += outputs.finish_O.tolist()
    assert finishes == [0, 0, 0, FinishReason.STOP]


@pytest.mark.parametrize(
    ("params", "bans"),
    [
        ({}, []),
        ({"stop_token_ids": [7]}, []),
        ({"min_tokens": 1}, [0, 1]),
        ({"min_tokens": 1, "ignore_eos": True}, []),
        ({"min_tokens": 1, "ignore_eos": True, "stop_token_ids": [7, 7, 5]}, [5, 7]),
    ],
)
def test_bans(params, bans):
    cluster = SimCluster(make_config(eos_token_ids=(0, 1, 50, -1)))  # the last two are not in the vocabulary
    cluster.submit(make_request(0, **params))
    assert cluster.plan().admit_bans.tolist() == bans


def test_max_model_len_cuts_max_tokens():
    cluster = run(make_config(), make_request(0, length=29, max_tokens=100, min_tokens=100, ignore_eos=True))
    assert len(cluster.tokens[0]) == 3
    assert cluster.finish[0] == FinishReason.LENGTH


def test_sampling_record_and_bias():
    cluster = SimCluster(make_config(num_ranks=1, num_blocks=40))
    params = {"temperature": 0.5, "top_p": 0.25, "top_k": 5, "min_p": 0.125, "logprobs": 0, "prompt_logprobs": 4}
    cluster.submit(
        make_request(1, length=2),
        make_request(2, length=2, branch=3, **params),
        make_request(3, length=2, top_k=0, max_tokens=10**12, min_tokens=10**12, logit_bias={7: -1.5, 3: 2.0}),
    )
    plan = cluster.plan().rank(0)
    default, full, clipped = plan.admit_sampling_A
    assert default["seed"] == 1
    assert [default[name] for name in ("branch", "top_k", "logprobs", "prompt_logprobs", "temperature")] == [
        0,
        -1,
        -1,
        -1,
        1,
    ]
    assert [full[name] for name in ("seed", "branch", "prompt_len", "top_k", "logprobs", "prompt_logprobs")] == [
        2,
        3,
        2,
        5,
        0,
        4,
    ]
    assert [full[name] for name in ("temperature", "top_p", "min_p", "repetition_penalty")] == [0.5, 0.25, 0.125, 1]
    assert [clipped[name] for name in ("top_k", "min_tokens")] == [-1, 30]
    assert [ids.tolist() for ids in plan.admit_bias_ids] == [[], [], [7, 3]]
    assert [values.tolist() for values in plan.admit_bias_values] == [[], [], [-1.5, 2.0]]


def test_running_requests_come_before_admissions():
    cluster = SimCluster(make_config(num_ranks=1, max_num_batched_tokens=6, num_blocks=40))
    cluster.submit(make_request(0, length=2, max_tokens=20, ignore_eos=True), make_request(1, length=20))
    assert cluster.plan().sched_num_S.tolist() == [2, 4]
    cluster.commit()
    cluster.submit(make_request(2, length=1))
    for expected in ([1, 5], [1, 5], [1, 5], [1, 1, 1]):
        plan = cluster.plan()
        assert plan.sched_num_S.tolist() == expected
        cluster.commit()


def test_admission_waits_for_blocks_and_keeps_the_order():
    # 8 blocks of 4 tokens: request 0 takes 5 and has one more set aside, 1 needs 3 and keeps 2, which needs 1, behind it.
    cluster = SimCluster(make_config(num_ranks=1, num_blocks=9, max_num_batched_tokens=32))
    cluster.submit(
        make_request(0, length=20, max_tokens=3, ignore_eos=True),
        make_request(1, length=9, max_tokens=8),
        make_request(2, length=1, max_tokens=1),
    )
    assert cluster.admitted(cluster.plan()) == [0]
    cluster.commit()
    while 0 not in cluster.finish:
        assert cluster.step().key_O.tolist() == [0]
    plan = cluster.plan()
    assert plan.release_slot.tolist() == [0]
    assert cluster.admitted(plan) == [1, 2]


def test_no_blocks_are_reserved_for_future_tokens():
    cluster = SimCluster(make_config(num_ranks=1, num_blocks=9))
    cluster.submit(*(make_request(key, length=2, max_tokens=20) for key in range(3)))
    assert cluster.admitted(cluster.plan()) == [0, 1, 2]


def test_a_released_slot_and_its_blocks_are_used_by_the_same_plan():
    cluster = SimCluster(make_config(num_ranks=1, max_num_seqs=1, num_blocks=3))
    cluster.submit(make_request(0, length=8, max_tokens=1), make_request(1, length=8, max_tokens=1))
    cluster.step()
    plan = cluster.plan()
    assert plan.release_slot.tolist() == plan.admit_slot_A.tolist() == [0]
    cluster.commit()
    assert set(cluster.finish) == {0, 1}


def test_no_more_requests_on_a_rank_than_its_token_budget():
    cluster = SimCluster(make_config(num_ranks=1, max_num_seqs=3, max_num_batched_tokens=2))
    cluster.submit(*(make_request(key, length=1, max_tokens=4, ignore_eos=True) for key in range(5)))
    for _ in range(4):
        assert cluster.step().key_O.tolist() == [0, 1]
    cluster.drain()
    assert len(cluster.finish) == 5


def test_ranks_are_balanced_by_tokens():
    cluster = SimCluster(make_config(max_num_batched_tokens=64, max_num_seqs=5, num_blocks=100))
    lengths = [20, 4, 4, 4, 4]  # one long request weighs as much as several short ones
    cluster.submit(*(make_request(key, length, max_tokens=1) for key, length in enumerate(lengths)))
    plan = cluster.plan()
    assert plan.num_tokens_P.tolist() == [20, 16]
    assert plan.rank(0).admit_sampling_A["seed"].tolist() == [0]


class Lifo(Policy):
    def order(self, queue, cached_tokens, may_start=None):
        return reversed(list(queue))


def test_a_policy_decides_the_order():
    cluster = SimCluster(make_config(num_ranks=1, max_num_seqs=1), Lifo())
    cluster.submit(*(make_request(key, max_tokens=1) for key in range(3)))
    cluster.drain()
    assert list(cluster.finish) == [2, 1, 0]


def test_abort_waiting_running_and_in_flight():
    cluster = SimCluster(make_config(num_ranks=1, max_num_seqs=2))
    cluster.submit(*(make_request(key, length=2, max_tokens=9, ignore_eos=True) for key in range(4)))
    cluster.step()
    cluster.scheduler.abort(3)  # waiting
    plan = cluster.plan()
    cluster.scheduler.abort(0)  # in flight
    cluster.scheduler.abort(0)
    cluster.scheduler.abort(99)
    assert cluster.commit().key_O.tolist() == [1]
    cluster.scheduler.abort(1)  # running
    plan = cluster.plan()
    assert plan.release_slot.tolist() == [0, 1]
    assert cluster.admitted(plan) == [2]
    cluster.commit()
    cluster.drain()
    assert {key: len(tokens) for key, tokens in cluster.tokens.items()} == {0: 1, 1: 2, 2: 9, 3: 0}
    assert set(cluster.finish) == {2}


def test_a_key_may_be_used_again_while_its_aborted_request_is_in_flight():
    cluster = SimCluster(make_config(num_ranks=1))
    cluster.submit(make_request(0, max_tokens=5, ignore_eos=True))
    cluster.plan()
    cluster.scheduler.abort(0)
    cluster.submit(make_request(0, max_tokens=3, ignore_eos=True))
    assert cluster.commit().key_O.tolist() == []
    cluster.drain()
    assert len(cluster.tokens[0]) == 3


def test_log_probabilities_follow_their_requests():
    cluster = SimCluster(make_config(num_ranks=2, max_num_batched_tokens=4, max_num_seqs=4))
    params = [
        {"logprobs": 2, "prompt_logprobs": 1},
        {},
        {"prompt_logprobs": 0},
        {"logprobs": 3, "prompt_logprobs": 2},
        {"logprobs": 0},
    ]
    requests = [make_request(key, 6, max_tokens=3, ignore_eos=True, **p) for key, p in enumerate(params)]
    cluster.submit(*requests)
    prompt_rows, tops = {}, {}
    while (plan := cluster.plan()) is not None:
        if plan.step == 3:
            cluster.scheduler.abort(3)
        out = cluster.commit()
        for i, key in enumerate(out.key_O.tolist()):
            ids = out.top_ids[out.top_offsets_O1[i] : out.top_offsets_O1[i + 1]]
            assert out.top_logprobs[out.top_offsets_O1[i] : out.top_offsets_O1[i + 1]].tolist() == (-ids).tolist()
            wanted = requests[key].params.logprobs
            assert ids.tolist() == [out.token_O[i] + j for j in range(wanted or 0)]
            assert out.token_rank_O[i] == (wanted is not None)
            np.testing.assert_equal(out.logprob_O[i], np.float32(np.nan if wanted is None else -out.token_O[i]))
            tops[key] = tops.get(key, 0) + 1
        for i, key in enumerate(out.prompt_key_I.tolist()):
            assert not (plan.step >= 3 and key == 3), "rows of an aborted request"
            token = requests[key].prompt[out.prompt_position_I[i]]
            ids = out.prompt_top_ids[out.prompt_top_offsets_I1[i] : out.prompt_top_offsets_I1[i + 1]].tolist()
            assert ids == [token + j for j in range(requests[key].params.prompt_logprobs)]
            assert (out.prompt_logprob_I[i], out.prompt_token_rank_I[i]) == (-token, 1)
            prompt_rows.setdefault(key, []).append(int(out.prompt_position_I[i]))
        assert len(out.prompt_top_logprobs) == out.prompt_top_offsets_I1[-1]
    assert [prompt_rows.get(key) for key in (0, 1, 2, 4)] == [[1, 2, 3, 4, 5], None, [1, 2, 3, 4, 5], None]
    assert [tops[key] for key in (0, 1, 2, 4)] == [3, 3, 3, 3]


def test_outputs_of_an_aborted_request_are_dropped():
    cluster = SimCluster(make_config(num_ranks=1, max_num_batched_tokens=20))
    cluster.submit(*(make_request(key, length=4, logprobs=2, prompt_logprobs=3) for key in range(3)))
    cluster.plan()
    cluster.scheduler.abort(1)
    out = cluster.commit()
    assert out.key_O.tolist() == [0, 2]
    assert out.top_offsets_O1.tolist() == [0, 2, 4]
    assert out.top_ids.tolist() == (-out.top_logprobs).tolist() == [t + i for t in out.token_O for i in (0, 1)]
    assert out.prompt_key_I.tolist() == [0, 0, 0, 2, 2, 2]
    assert out.prompt_position_I.tolist() == [1, 2, 3, 1, 2, 3]
    assert out.prompt_top_offsets_I1.tolist() == [0, 3, 6, 9, 12, 15, 18]
    assert out.prompt_top_logprobs.tolist() == (-out.prompt_top_ids).tolist()
    assert out.prompt_top_ids.tolist() == [int(i - t) for t in out.prompt_logprob_I for i in (0, 1, 2)]


def test_plans_carry_the_epoch():
    cluster = SimCluster(make_config())
    assert cluster.scheduler.plan(0.0, report_load=True).epoch == 0
    other = SimCluster(make_config())
    other.scheduler.epoch = 7
    assert other.scheduler.plan(0.0, report_load=True).epoch == 7


def test_unfinished_requests():
    cluster = SimCluster(make_config(num_ranks=1, max_num_seqs=2))
    cluster.submit(*(make_request(key, max_tokens=3, ignore_eos=True) for key in range(4)))
    cluster.step()
    cluster.scheduler.abort(1)
    assert sorted(cluster.scheduler.unfinished()) == [0, 2, 3]
    cluster.drain()
    assert cluster.scheduler.unfinished() == []


def test_plan_without_work_reports_the_load():
    cluster = SimCluster(make_config())
    assert cluster.scheduler.plan(0.0) is None
    plan = cluster.scheduler.plan(0.0, report_load=True)
    assert (plan.report_load, plan.num_tokens_P.tolist()) == (1, [0, 0])
    cluster.scheduler.commit(plan, [rank.run(plan) for rank in cluster.ranks], 0.0)
    assert cluster.scheduler.idle


@pytest.mark.parametrize(
    "spoil",
    [
        lambda results: results[:1],
        lambda results: [results[0], results[0]],
        lambda results: [replace(results[0], step=5), results[1]],
        lambda results: [replace(results[0], slot_O=results[0].slot_O + 1), results[1]],
    ],
)
def test_results_that_do_not_belong_to_the_step(spoil):
    cluster = SimCluster(make_config())
    cluster.submit(make_request(0), make_request(1))
    plan = cluster.plan()
    results = [rank.run(plan) for rank in cluster.ranks]
    with pytest.raises(AssertionError, match="step 0: "):
        cluster.scheduler.commit(plan, spoil(results), 0.0)


def test_stats():
    cluster = SimCluster(make_config(max_num_seqs=1))
    cluster.submit(*(make_request(key, length=5, max_tokens=10, ignore_eos=True) for key in range(3)))
    cluster.step()
    stats = cluster.scheduler.stats()
    assert (stats["num_running"], stats["num_waiting"], stats["running"]) == (2, 1, [1, 1])
    assert stats["blocks_used"] == {"first": [2, 2], "second": [2, 2]}
    assert stats["outstanding_tokens"] == [10, 10]
    assert (stats["blocks"], stats["num_plans"]) == ({"first": 16, "second": 16}, 1)
    assert (stats["prompt_tokens"], stats["cached_tokens"], stats["preemptions"]) == (10, 0, 0)


def test_the_same_calls_give_the_same_plans():
    def plans():
        cluster = SimCluster(make_config(max_num_seqs=2))
        for key in range(20):
            cluster.submit(make_request(key, length=1 + key * 7 % 20, max_tokens=1 + key % 5))
            if key % 3 == 0:
                cluster.scheduler.abort(key - 2)
            cluster.step()
        cluster.drain()
        return cluster.plans

    first, second = plans(), plans()
    assert len(first) == len(second) > 20
    assert all(same(a, b) for a, b in zip(first, second, strict=True))


def test_serving_makes_no_cyclic_garbage():
    """The controller disables the collector while it serves."""

    def serve():
        cluster = SimCluster(make_config(num_blocks=9, max_num_seqs=4), overlap=True, check=False)
        cluster.submit(*(make_request(key, 2 + 5 * key % 17, shared=6, max_tokens=5 + key % 13) for key in range(60)))
        for key in range(0, 60, 7):
            cluster.step()
            cluster.abort(key)
        cluster.drain()
        assert cluster.scheduler.stats()["preemptions"]

    serve()  # loads the compiled loops, unless a test before has
    gc.collect()
    gc.freeze()  # threads that tests before have left may end meanwhile
    gc.disable()
    try:
        serve()
        assert gc.collect() == 0
    finally:
        gc.enable()
        gc.unfreeze()
