"""Requests, their updates and their ends, over a channel whose other end the test holds."""

from __future__ import annotations

import dataclasses
import select

import numpy as np
import pytest
from helpers import tokenizer_files
from helpers.fake_controller import INFO, HandController, PromptRow, Row
from hypothesis import given
from hypothesis import strategies as st

from expertwire.engine.frontend.api import EngineFailed, Logprob, RequestOptions
from expertwire.engine.frontend.frontend import Frontend
from expertwire.engine.frontend.stop_strings import StopAutomaton, StopStrings
from expertwire.engine.frontend.tokenizer import Tokenizer
from expertwire.engine.messages import Abort, Failure, Stats, StatsRequest, Submit
from expertwire.scheduler.outputs import FinishReason, Rejection
from expertwire.scheduler.sampling_params import SamplingParams

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
NAN = float("nan")


class TextFrontend(Frontend):
    """Encodes the prompts that it submits."""

    def submit(self, prompt, params, *options, **flow):
        return super().submit(self.encode(prompt, params), params, *options, **flow)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.open(tokenizer_files.write(tmp_path_factory.mktemp("tokenizer"), "byte_level"))


@pytest.fixture
def controller():
    controller = HandController()
    yield controller
    controller.close()


@pytest.fixture
def frontend(controller, tokenizer):
    return TextFrontend(controller.frontend_channel, tokenizer)


def ids(tokenizer, text):
    return tokenizer.encode(text)


def test_a_request_from_text_to_text(frontend, controller, tokenizer):
    assert frontend.model_info == INFO
    params = SamplingParams(max_tokens=9, seed=5, temperature=0.5)
    request = frontend.submit("The quick brown", params)
    [submit] = controller.heard()
    assert isinstance(submit, Submit)
    assert submit.tokens.tolist() == ids(tokenizer, "The quick brown")
    assert SamplingParams.from_dict(submit.params) == params
    assert frontend.num_open == 1
    wire = int(submit.sequence_ids[0])
    answer = ids(tokenizer, " fox 🙂")
    for token in answer[:-1]:
        controller.say(Row(wire, token))
    controller.say(Row(wire, answer[-1], LENGTH))
    [update] = frontend.poll(1.0)  # what nobody has taken is joined
    assert (update.request_id, update.branch, update.seed) == (request, 0, 5)
    assert (update.token_ids, update.text) == (tuple(answer), " fox 🙂")
    assert (update.finish_reason, update.done) == ("length", True)
    assert update.logprobs is None
    assert update.error is None
    assert frontend.num_open == 0
    assert frontend.poll(0.0) == []
    assert controller.heard() == []


def test_branches_are_requests_of_their_own(frontend, controller, tokenizer):
    prompt = ids(tokenizer, "the fox")
    request = frontend.submit(prompt, SamplingParams(n=3, prompt_logprobs=0))
    [submit] = controller.heard()
    assert submit.tokens.tolist() == prompt
    a, b, c = submit.sequence_ids.tolist()
    controller.say(Row(b, 50, LENGTH), Row(a, 51), Row(c, 52, LENGTH))
    updates = frontend.poll(1.0)
    assert [(update.branch, update.finish_reason, update.done) for update in updates] == [
        (1, "length", False),
        (0, None, False),
        (2, "length", False),
    ]
    controller.say(Row(a, 53, STOP))
    [update] = frontend.poll(1.0)
    assert (update.request_id, update.finish_reason, update.done) == (request, "stop", True)
    assert update.seed == submit.params["seed"]


def test_options_reach_the_controller(frontend, controller):
    options = RequestOptions(priority=-3, tenant="acme", cache_salt="é", deadline_s=2.5)
    frontend.submit("a", SamplingParams(n=2), options)
    frontend.submit("a", SamplingParams())
    both, plain = controller.heard()
    assert RequestOptions(**both.options) == options
    assert RequestOptions(**plain.options) == RequestOptions()


def test_cached_tokens_are_those_of_the_first_branch(frontend, controller):
    request = frontend.submit([10, 11, 12], SamplingParams(n=2))
    first, second = controller.heard()[0].sequence_ids.tolist()
    controller.say(Row(second, 50, num_cached=3))
    controller.say(Row(first, 50, num_cached=2), Row(second, 51, LENGTH, num_cached=3))
    assert [(update.branch, update.num_cached_tokens) for update in frontend.poll(1.0)] == [(1, 2), (0, 2)]
    frontend.abort(request)
    assert [update.num_cached_tokens for update in frontend.poll(1.0)] == [2]


class TestEnds:
    def test_the_token_that_stops_has_no_text(self, frontend, controller, tokenizer):
        params = SamplingParams(stop_token_ids=[60], skip_special_tokens=False)
        frontend.submit("a", params)
        frontend.submit("a", params)
        first, second = (int(submit.sequence_ids[0]) for submit in controller.heard())
        controller.say(Row(first, 4, STOP), Row(second, 60, STOP))
        eos, stop = frontend.poll(1.0)
        assert (eos.token_ids, eos.text, eos.stop_reason) == ((4,), "", None)
        assert (stop.token_ids, stop.text, stop.stop_reason) == ((60,), "", 60)

    def test_special_tokens_in_the_text(self, frontend, controller):
        for skip, text in ((True, ""), (False, "<|im_start|>")):
            frontend.submit("a", SamplingParams(skip_special_tokens=skip))
            controller.say(Row(int(controller.heard()[0].sequence_ids[0]), 3, LENGTH))
            assert frontend.poll(1.0)[0].text == text

    def test_an_unfinished_character_is_released_at_the_end(self, frontend, controller, tokenizer):
        frontend.submit("a", SamplingParams())
        wire = int(controller.heard()[0].sequence_ids[0])
        controller.say(Row(wire, ids(tokenizer, "🙃")[0], LENGTH))
        [update] = frontend.poll(1.0)
        assert update.text == "�"

    def test_the_client_aborts(self, frontend, controller, tokenizer):
        request = frontend.submit("a", SamplingParams(n=2, stop="fox jumps"))
        [submit] = controller.heard()
        wires = submit.sequence_ids.tolist()
        controller.say(*(Row(wires[0], token) for token in ids(tokenizer, "fox")))
        assert "".join(update.text for update in frontend.poll(1.0)) == ""
        assert frontend.abort(request)
        assert frontend.num_open == 0
        [abort] = controller.heard()
        assert isinstance(abort, Abort)
        assert abort.ids.tolist() == wires
        updates = frontend.poll(3600.0)
        assert [(update.branch, update.text, update.done) for update in updates] == [(0, "fox", False), (1, "", True)]
        assert {update.finish_reason for update in updates} == {"abort"}
        controller.say(Row(wires[0], 50), Row(wires[1], 51, LENGTH))
        assert not frontend.abort(request)
        assert not frontend.abort(12345)
        assert controller.heard() == []
        assert frontend.poll(0.0) == []

    def test_rejected(self, frontend, controller):
        request = frontend.submit("a", SamplingParams(n=2))
        other = frontend.submit("b", SamplingParams())
        wires = controller.heard()[0].sequence_ids.tolist()
        controller.send(Rejection(wires[1], "RESOURCE_EXHAUSTED", "4096 requests wait", 1.5))
        [update] = frontend.poll(1.0)
        assert update.request_id == request
        assert update.error == ("RESOURCE_EXHAUSTED", "4096 requests wait", 1.5)
        assert update.done
        assert frontend.num_open == 1
        [abort] = controller.heard()
        assert wires[0] in abort.ids.tolist()
        controller.say(Row(wires[0], 50))
        assert frontend.poll(1.0) == []
        assert other != request

    def test_logits_that_are_not_finite_end_the_request_alone(self, frontend, controller):
        request, other = (frontend.submit("a", SamplingParams(n=n)) for n in (2, 1))
        submitted = controller.heard()
        wires, [wire] = (message.sequence_ids.tolist() for message in submitted)
        controller.say(Row(wire, 50), Row(wires[1], 50), failed=[(wires[0], 12, 1), (999, 1, 0)])
        failed, update = sorted(frontend.poll(1.0), key=lambda update: update.request_id)
        assert (failed.request_id, failed.done, failed.error.code) == (request, True, "INTERNAL")
        assert (
            failed.error.message
            == "the logits for the token at position 12 are not finite (NaN or infinite), on rank 1"
        )
        assert (update.request_id, update.error, update.token_ids) == (other, None, (50,))
        [abort] = controller.heard()
        assert wires[1] in abort.ids.tolist()


class TestStopStrings:
    def run(self, frontend, controller, tokenizer, params, text, finish=LENGTH):
        frontend.submit("a", params)
        wire = int(controller.heard()[0].sequence_ids[0])
        tokens = ids(tokenizer, text)
        for i, token in enumerate(tokens):
            controller.say(Row(wire, token, finish if i + 1 == len(tokens) else 0))
        return wire, frontend.poll(1.0)

    def test_text_ends_before_the_stop_string(self, frontend, controller, tokenizer):
        wire, updates = self.run(
            frontend, controller, tokenizer, SamplingParams(stop=["own fo", "dog"]), "quick brown fox jumps"
        )
        assert "".join(update.text for update in updates) == "quick br"
        assert (updates[-1].finish_reason, updates[-1].stop_reason, updates[-1].done) == ("stop", "own fo", True)
        [abort] = controller.heard()
        assert abort.ids.tolist() == [wire]
        assert tokenizer.decode([token for update in updates for token in update.token_ids]) == "quick brown fox"

    def test_a_beginning_is_held_back_until_it_is_none(self, frontend, controller, tokenizer):
        _, updates = self.run(
            frontend, controller, tokenizer, SamplingParams(stop="quick brown dog"), "quick brown fox"
        )
        assert [update.text for update in updates if update.text] == ["quick brown fox"]
        _, updates = self.run(frontend, controller, tokenizer, SamplingParams(stop="quick brown dog"), "quick brown")
        assert updates[-1].text == "quick brown"
        assert updates[-1].finish_reason == "length"

    def test_the_last_token_completes_it(self, frontend, controller, tokenizer):
        _, updates = self.run(frontend, controller, tokenizer, SamplingParams(stop="fox"), "brown fox")
        assert "".join(update.text for update in updates) == "brown "
        assert (updates[-1].finish_reason, updates[-1].stop_reason) == ("stop", "fox")
        assert controller.heard() == []

    def test_none_before_min_tokens(self, frontend, controller, tokenizer):
        first = len(ids(tokenizer, "fox"))
        params = SamplingParams(stop="fox", min_tokens=first, max_tokens=50)
        _, updates = self.run(frontend, controller, tokenizer, params, "fox fox fox")
        assert "".join(update.text for update in updates) == "fox "
        assert updates[-1].stop_reason == "fox"

    @given(
        st.lists(st.text("abc", max_size=9)),
        st.lists(st.text("abc", min_size=1, max_size=7), min_size=1, max_size=9),
    )
    def test_pieces_make_no_difference(self, pieces, strings):
        text, expected, found = "".join(pieces), "".join(pieces), None
        for end in range(len(text) + 1):
            complete = [string for string in strings if text[:end].endswith(string)]
            if complete:
                found = max(complete, key=len)
                expected = text[: end - len(found)]
                break
        automaton = StopAutomaton(strings)
        other = StopStrings(automaton)  # another branch, which has made states of its own
        other.push(text[::-1])
        stop, out, seen = StopStrings(automaton), "", ""
        for piece in pieces:
            if stop.found is None:
                out, seen = out + stop.push(piece), seen + piece
            if stop.found is None:
                beginnings = [
                    n for n in range(len(seen) + 1) if any(s.startswith(seen[len(seen) - n :]) for s in strings)
                ]
                assert len(seen) - len(out) == max(beginnings)
        assert (out if stop.found else out + stop.flush(), stop.found) == (expected, found)

    def test_a_chain_of_suffixes_is_no_recursion(self):
        word = "".join(map(chr, range(0x4E00, 0x4E00 + 2000)))
        stop = StopStrings(StopAutomaton([word[at:] + "!" for at in range(0, 2000, 2)]))
        assert stop.push(word) == ""
        assert stop.push("?") == word + "?"


class TestExpertLoad:
    def test_comes_with_the_end_and_adds_up(self, frontend, controller):
        frontend.submit("a", SamplingParams(expert_load=True, n=2))
        [_, second] = controller.heard()[0].sequence_ids.tolist()
        controller.say(routed=[(second, 0, 3), (999, 0, 9), (second, 3, 1)])
        controller.say(Row(second, 50), routed=[(second, 3, 1)])
        controller.say(Row(second, 50, LENGTH), routed=[(second, 3, 4), (second, 3, 2)])
        *before, last = frontend.poll(1.0)
        assert [update.expert_load for update in before] == [None] * len(before)
        assert (INFO.num_layers, INFO.num_experts) == (1, 4)
        assert last.expert_load == [[3, 0, 0, 8]]

    def test_of_a_request_that_is_aborted_as_far_as_it_went(self, frontend, controller):
        request = frontend.submit("a", SamplingParams(expert_load=True))
        controller.say(routed=[(int(controller.heard()[0].sequence_ids[0]), 2, 5)])
        assert frontend.poll(1.0) == []
        frontend.abort(request)
        [update] = frontend.poll(1.0)
        assert sum(map(sum, update.expert_load)) == update.expert_load[0][2] == 5


class TestLogprobs:
    def test_sampled_and_top(self, frontend, controller, tokenizer):
        frontend.submit("a", SamplingParams(logprobs=2))
        wire = int(controller.heard()[0].sequence_ids[0])
        controller.say(Row(999, 1, top={1: -9.0}), Row(wire, 50, 0, -2.5, 7, {60: -0.5, 61: -1.5}))
        controller.say(Row(wire, 61, LENGTH, -1.5, 2, {60: -0.5, 61: -1.5}))
        [update] = frontend.poll(1.0)
        first, second = update.logprobs
        text = tokenizer.token_text
        assert list(first.items()) == [
            (50, Logprob(-2.5, 7, text(50))),
            (60, Logprob(-0.5, 1, text(60))),
            (61, Logprob(-1.5, 2, text(61))),
        ]
        assert list(second.items()) == [(61, Logprob(-1.5, 2, text(61))), (60, Logprob(-0.5, 1, text(60)))]

    def test_only_the_sampled_one(self, frontend, controller):
        frontend.submit("a", SamplingParams(logprobs=0))
        controller.say(Row(int(controller.heard()[0].sequence_ids[0]), 50, LENGTH, -2.5, 7))
        [update] = frontend.poll(1.0)
        assert [list(entry) for entry in update.logprobs] == [[50]]

    def test_as_numbers(self, frontend, controller):
        frontend.submit("a", SamplingParams(logprobs=0), only_sampled=True)
        wire = int(controller.heard()[0].sequence_ids[0])
        controller.say(Row(wire, 50, 0, -2.5, 7))
        controller.say(Row(wire, 51, 0, -0.5, 1))
        [update] = frontend.poll(1.0)
        assert (update.logprobs, update.sampled_logprobs) == (None, (-2.5, -0.5))
        controller.say(Row(wire, 52, LENGTH, -1.5, 2))
        [update] = frontend.poll(1.0)
        assert update.sampled_logprobs == (-1.5,)

    def test_may_be_news_of_a_quiet_request(self, frontend, controller):
        number = frontend.submit("a", SamplingParams(logprobs=0), is_quiet=True, only_sampled=True)
        wire = int(controller.heard()[0].sequence_ids[0])
        [branch] = frontend.find(number).running.values()
        branch.watch = lambda logprob: logprob < -2
        for logprob in (-1.0, -1.5):
            controller.say(Row(wire, 50, 0, logprob, 1))
            assert frontend.poll(0.05) == []
        controller.say(Row(wire, 51, 0, -2.5, 1))
        [update] = frontend.poll(1.0)
        assert (update.token_ids, update.sampled_logprobs) == ((50, 50, 51), (-1.0, -1.5, -2.5))

    def test_of_the_prompt_in_chunks(self, frontend, controller):
        frontend.submit([10, 11, 12, 13], SamplingParams(prompt_logprobs=1))
        wire = int(controller.heard()[0].sequence_ids[0])
        controller.say(prompt_rows=[PromptRow(wire, 1, -1.0, 3, {20: -0.5}), PromptRow(888, 1, -9.0, 1)])
        assert frontend.poll(1.0) == []
        rows = [PromptRow(wire, 2, -2.0, 1, {12: -2.0}), PromptRow(wire, 3, -3.0, 9, {21: -0.25})]
        controller.say(Row(wire, 50), prompt_rows=rows)
        [first] = frontend.poll(1.0)
        controller.say(Row(wire, 51, LENGTH))
        [last] = frontend.poll(1.0)
        assert first.prompt_logprobs[0] is None
        assert [{token: entry[:2] for token, entry in entries.items()} for entries in first.prompt_logprobs[1:]] == [
            {11: (-1.0, 3), 20: (-0.5, 1)},
            {12: (-2.0, 1)},
            {13: (-3.0, 9), 21: (-0.25, 1)},
        ]
        assert last.prompt_logprobs is None

    def test_of_the_prompt_come_with_the_branch_that_computes_them(self, frontend, controller):
        frontend.submit([10, 11], SamplingParams(prompt_logprobs=0, n=2))
        first, second = controller.heard()[0].sequence_ids.tolist()
        controller.say(Row(second, 50))
        controller.say(Row(first, 50), prompt_rows=[PromptRow(first, 1, -1.0, 3)])
        assert [(update.branch, bool(update.prompt_logprobs)) for update in frontend.poll(1.0)] == [
            (1, False),
            (0, True),
        ]

    def test_of_a_prompt_of_one_token(self, frontend, controller):
        frontend.submit([10], SamplingParams(prompt_logprobs=1))
        controller.say(Row(int(controller.heard()[0].sequence_ids[0]), 50, LENGTH))
        [update] = frontend.poll(1.0)
        assert update.prompt_logprobs == [None]


class TestSeeds:
    def seeds(self, tokenizer, **options):
        controller = HandController()
        frontend = TextFrontend(controller.frontend_channel, tokenizer, **options)
        for seed in (None, None, 3):
            frontend.submit("a", SamplingParams(seed=seed))
        seeds = [submit.params["seed"] for submit in controller.heard()]
        controller.close()
        return seeds

    def test_deterministic(self, tokenizer):
        first = self.seeds(tokenizer, deterministic_seeds=True)
        assert first == self.seeds(tokenizer, deterministic_seeds=True)
        assert first[0] != first[1]
        assert first[2] == 3

    def test_from_the_system(self, tokenizer):
        assert self.seeds(tokenizer)[:2] != self.seeds(tokenizer)[:2]


class TestBadRequests:
    @pytest.mark.parametrize(
        ("prompt", "params", "error"),
        [
            ([], {}, "at least one token"),
            ("", {}, "at least one token"),
            (7, {}, "string or a list of token ids, got int"),
            (b"abc", {}, "string or a list of token ids, got bytes"),
            (None, {}, "got NoneType"),
            ([1.5], {}, "integer token ids"),
            ([True], {}, "integer token ids"),
            (["a"], {}, "integer token ids"),
            ([[1, 2], [3]], {}, "flat list"),
            ([[1, 2]], {}, "flat list"),
            ([2**70], {}, "token ids"),
            ([1, 400], {}, r"prompt must be token ids in \[0, 400\), got 400"),
            ([-1], {}, "got -1"),
            ([1] * 64, {}, "max_model_len 64 allows at most 63"),
            ("a\ud800", {}, "valid Unicode"),
            ([1], {"stop_token_ids": [400]}, "stop_token_ids must be token ids"),
            ([1], {"logit_bias": {400: 1.0}}, "logit_bias must be token ids"),
        ],
    )
    def test_is_refused_at_once(self, frontend, controller, prompt, params, error):
        with pytest.raises(ValueError, match=error):
            frontend.submit(prompt, SamplingParams(**params))
        assert frontend.num_open == 0
        assert controller.heard() == []

    def test_without_a_tokenizer(self, controller):
        frontend = TextFrontend(controller.frontend_channel, None)
        with pytest.raises(ValueError, match="text prompt needs a tokenizer"):
            frontend.submit("a", SamplingParams())
        with pytest.raises(ValueError, match="stop needs a tokenizer"):
            frontend.submit([1], SamplingParams(stop="a"))
        frontend.submit(np.array([1, 2]), SamplingParams(logprobs=0))
        controller.say(Row(int(controller.heard()[0].sequence_ids[0]), 50, LENGTH, -1.0, 1))
        [update] = frontend.poll(1.0)
        assert (update.token_ids, update.text, update.logprobs) == ((50,), "", ({50: Logprob(-1.0, 1, None)},))

    def test_more_logprobs_than_tokens(self, tokenizer):
        controller = HandController(dataclasses.replace(INFO, vocab_size=16))
        frontend = TextFrontend(controller.frontend_channel, None)
        with pytest.raises(ValueError, match="logprobs must be at most the vocabulary's 16, got 20"):
            frontend.submit([1], SamplingParams(logprobs=20))
        controller.close()


class TestFailure:
    def check(self, frontend, controller, requests, error, rank):
        updates = frontend.poll(5.0)
        assert [update.request_id for update in updates if update.error] == requests
        for update in updates:
            if update.error:
                assert update.done
                assert update.error.code == "UNAVAILABLE"
                assert error in update.error.message
        assert frontend.num_open == 0
        for call in (lambda: frontend.poll(5.0), lambda: frontend.submit("a", SamplingParams()), frontend.stats):
            with pytest.raises(EngineFailed, match=error) as caught:
                call()
            assert caught.value.rank == rank
        assert error in str(frontend.failure)
        frontend.abort(requests[0])

    def test_of_a_rank(self, frontend, controller):
        requests = [frontend.submit("a", SamplingParams(n=n)) for n in (1, 2)]
        wire = int(controller.heard()[0].sequence_ids[0])
        controller.say(Row(wire, 50))
        controller.send(Failure(rank=3, message="killed by signal 9"))
        self.check(frontend, controller, requests, "rank 3: killed by signal 9", 3)

    def test_of_the_controller(self, frontend, controller):
        requests = [frontend.submit("a", SamplingParams()) for _ in range(2)]
        controller.channel.close()
        self.check(frontend, controller, requests, "connection to the controller is lost", -1)

    def test_at_the_greeting(self, tokenizer):
        controller = HandController(greet=False)
        with pytest.raises(EngineFailed, match=r"did not answer within 0\.01 s"):
            TextFrontend(controller.frontend_channel, tokenizer, welcome_timeout_s=0.01)
        controller.send(Failure(rank=-1, message="out of memory"))
        with pytest.raises(EngineFailed, match="out of memory"):
            TextFrontend(controller.frontend_channel, tokenizer)
        controller.channel.close()
        with pytest.raises(EngineFailed, match="lost"):
            TextFrontend(controller.frontend_channel, tokenizer)
        controller.close()


def test_statistics_keep_what_arrives_meanwhile(frontend, controller):
    frontend.submit("a", SamplingParams())
    wire = int(controller.heard()[0].sequence_ids[0])
    controller.say(Row(wire, 50))
    with pytest.raises(TimeoutError, match=r"within 0\.01 s"):
        frontend.stats(0.01)
    assert [type(message) for message in controller.heard()] == [StatsRequest]
    controller.send(Stats(values={"age": "late"}))
    controller.say(Row(wire, 51))
    controller.send(Stats(values={"age": "new"}))
    assert frontend.stats(5.0) == {"age": "new"}
    assert [update.token_ids for update in frontend.poll(3600.0)] == [(50, 51)]


def test_statistics_count_what_arrives_meanwhile_once(frontend, controller):
    frontend.submit([10, 11, 12], SamplingParams(prompt_logprobs=0, expert_load=True))
    wire = int(controller.heard()[0].sequence_ids[0])
    rows = [PromptRow(wire, 1, -1.0, 3), PromptRow(wire, 2, -2.0, 1)]
    controller.say(Row(wire, 50, LENGTH), prompt_rows=rows, routed=[(wire, 0, 7)])
    controller.send(Stats(values={}))
    assert frontend.stats(5.0) == {}
    [update] = frontend.poll(1.0)
    assert len(update.prompt_logprobs) == 3
    assert sum(map(sum, update.expert_load)) == 7


def test_fileno_shows_what_arrives(frontend, controller):
    assert select.select([frontend], [], [], 0) == ([], [], [])
    frontend.submit("a", SamplingParams())
    controller.say(Row(int(controller.heard()[0].sequence_ids[0]), 50))
    assert select.select([frontend], [], [], 5)[0] == [frontend]
    frontend.close()
    frontend.close()


class TestBatches:
    """`receive` with `max_rows` leaves what is too much for one turn of a loop."""

    @pytest.mark.parametrize(("num_top", "in_a_batch"), [(0, 10), (32, 4), (400, 1)])
    def test_rows_with_log_probabilities_weigh_more(self, frontend, controller, num_top, in_a_batch):
        request = frontend.submit("a", SamplingParams(n=30, logprobs=min(num_top, 64)))
        (submit,) = controller.heard()
        top = {token: -float(token) for token in range(num_top)}
        controller.say(*(Row(wire, 50, logprob=-1.0, rank=1, top=top) for wire in submit.sequence_ids.tolist()))
        branches = []
        while len(branches) < 30:
            news = frontend.receive(1.0, 10)
            updates = [update for each in news for update in frontend.take(each)]
            assert [update.request_id for update in updates] == [request] * len(updates)
            assert len(updates) == min(in_a_batch, 30 - len(branches))
            branches += [update.branch for update in updates]
        assert branches == list(range(30))
