"""Thinking control through whole engines: each token by the reference's logits and the definition, and what is refused."""

import dataclasses

import numpy as np
import pytest
from helpers import chat_templates
from helpers import tiny_checkpoints as tiny
from helpers.fake_controller import INFO
from helpers.thinking_machine import Limits, Marks, banned, chosen, num_reasoning, split

from expertwire import LLM, SamplingParams
from expertwire.engine.config.thinking import ThinkingIds
from expertwire.engine.frontend import sentences
from expertwire.engine.frontend.chat import Chat, ChatText
from expertwire.engine.frontend.prompts import check_params, with_effort
from expertwire.engine.frontend.tokenizer import Tokenizer
from expertwire.kernels.ops.sampling import uniform

FAMILIES = chat_templates.FAMILIES
OPTIONS = {"dtype": "float32", "threads_per_rank": 1, "launcher": "local", "max_model_len": 128}


def write(folder, family, *more):
    """A checkpoint that speaks like the family, with more tokens in its vocabulary."""
    tiny.make("qwen3_moe", folder)
    return chat_templates.write(folder, dataclasses.replace(family, plain=(*family.plain, *more)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("qwen3"), FAMILIES["qwen3"], "Wait", "So.")


def marks_of(llm):
    ids = llm.tokenizer.thinking_ids
    return Marks(ids.start, ids.end, ids.wait, frozenset(llm.model_info.eos_token_ids), frozenset(ids.sentence_ends))


def requests(llm, num, rng):
    """Prompts, half of which open the reasoning, and parameters."""
    marks = marks_of(llm)
    [so] = llm.tokenizer.encode("So.")
    prompts, params = [], []
    for i in range(num):
        opening = [*marks.start, *llm.tokenizer.encode("\n")[: rng.integers(2)]] if rng.random() < 0.7 else []
        prompts.append([*tiny.prompt(int(rng.integers(1, 60)), seed=i, vocab_size=250), *opening])
        budget = None if rng.random() < 0.1 else int(rng.integers(0, 12))
        params.append(
            SamplingParams(
                temperature=float(rng.choice([0.0, 0.8, 1.2])),
                max_tokens=int(rng.integers(1, 24)),
                seed=i,
                n=int(rng.integers(1, 3)),
                thinking_budget=budget,
                thinking_grace=0 if budget is None else int(rng.integers(0, 6)),
                min_thinking_tokens=int(rng.integers(0, 4 if budget is None else budget + 1)),
                logit_bias={marks.end: 3.0, so: 4.0, marks.start[0]: 2.0},
            )
        )
    return prompts, params


def drawable(logits_V, params, branch, prompt, i):
    """The tokens that a rounding error of the logits leaves to choose from: nearly always one."""
    if not params.temperature:
        return np.flatnonzero(logits_V >= logits_V.max() - 1e-4).tolist()
    p = np.exp((logits_V - logits_V.max()) / params.temperature)
    [number] = uniform(*(np.array([value]) for value in (params.seed, branch, len(prompt) + i)))
    first, last = np.searchsorted(np.cumsum(p / p.sum()), [number - 1e-5, number + 1e-5], side="right")
    return range(first, last + 1)


def check(folder, llm, prompt, params, output, marks):
    """Check every branch, token by token; return what was enforced."""
    is_open = llm.tokenizer.thinking_ids.opens(np.array(prompt, np.int32))
    budget = float("inf") if params.thinking_budget is None else params.thinking_budget
    limits, seen = Limits(budget, params.thinking_grace, params.min_thinking_tokens), np.zeros(3, int)
    for branch, completion in enumerate(output.outputs):
        tokens = list(completion.token_ids)
        logits_TV = tiny.reference_logits(folder, prompt + tokens)[len(prompt) - 1 :].astype(np.float64)
        for i, token in enumerate(tokens):
            before, logits_V = tokens[:i], logits_TV[i].copy()
            for biased, value in params.logit_bias.items():
                logits_V[biased] += value
            if (ban := banned(before, marks, limits, is_open)) is not None:
                logits_V[ban] = -np.inf
            expected = {
                chosen(drawn, before, marks, limits, is_open) for drawn in drawable(logits_V, params, branch, prompt, i)
            }
            assert token in expected, f"branch {branch}, output {i} of {tokens}: {expected}"
        assert len(tokens) == params.max_tokens or tokens[-1] in marks.eos
        num = num_reasoning(tokens, marks, is_open)
        assert num <= budget + params.thinking_grace
        assert (
            num >= params.min_thinking_tokens
            or len(tokens) == params.max_tokens
            or not split(tokens, marks, is_open)[0]
        )
        seen += (num == budget + params.thinking_grace, budget < num, marks.wait in tokens)
    return seen


@pytest.mark.parametrize(
    ("num", "options"),
    [
        (24, {"max_num_seqs": 12, "max_num_batched_tokens": 33, "kv_cache_memory_bytes": 280_000}),
        pytest.param(
            500,
            {"max_num_seqs": 24, "max_num_batched_tokens": 64, "kv_cache_memory_bytes": 600_000},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            500,
            {"ep_size": 2, "max_num_seqs": 12, "chunked_prefill_size": 5, "enable_two_batch_overlap": True},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["preempted", "500 preempted", "500 on two ranks, halves, chunks of 5"],
)
def test_exact_to_the_token(folder, num, options):
    with LLM(folder, **OPTIONS, **{"kv_cache_memory_bytes": 20_000_000, **options}) as llm:
        prompts, params = requests(llm, num, np.random.default_rng(num))
        outputs, marks = llm.generate(prompts, params, use_tqdm=False), marks_of(llm)
        seen = sum(check(folder, llm, *each, marks) for each in zip(prompts, params, outputs, strict=True))
        assert (seen > num / 50).all(), seen
        stats, kept = llm.stats(), sum(len(each.token_ids) for output in outputs for each in output.outputs)
        assert kept == stats["tokens_sampled"] - stats["tokens_dropped"]
        if "max_num_batched_tokens" in options:
            assert stats["preemptions"] > 0


def test_forced_tokens_have_the_models_log_probabilities(folder):
    """Those of the raw logits, as of any token."""
    params = SamplingParams(temperature=0, max_tokens=3, thinking_budget=1, logprobs=0)
    with LLM(folder, **OPTIONS, kv_cache_memory_bytes=20_000_000) as llm:
        marks = marks_of(llm)
        prompt = [70, 71, 72, *marks.start]
        [completion] = llm.generate([prompt], params, use_tqdm=False)[0].outputs
    assert completion.token_ids[1] == marks.end
    logits_V = tiny.reference_logits(folder, [*prompt, completion.token_ids[0]])[-1].astype(np.float64)
    expected = logits_V[marks.end] - np.log(np.exp(logits_V - logits_V.max()).sum()) - logits_V.max()
    assert completion.logprobs[1][marks.end].logprob == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_ranks_know_what_the_output_format_says(tmp_path, family):
    tokenizer = Tokenizer.open(chat_templates.write(tmp_path, FAMILIES[family]))
    ids, output_format = tokenizer.thinking_ids, tokenizer.output_format
    assert (ids is None) == (output_format.reasoning is None)
    if ids is not None:
        delimiters = tuple(tokenizer.decode(some, skip_special_tokens=False) for some in (ids.start, [ids.end]))
        assert delimiters == output_format.reasoning
        assert ThinkingIds.from_arrays(ids.to_arrays()) == ids
        for thinking in (None, True, False):
            try:
                prompt = tokenizer.render_chat(Chat(messages=chat_templates.QUESTION, thinking=thinking))
            except ValueError:  # there is no such switch
                continue
            tokens = np.array(tokenizer.encode(prompt, add_special_tokens=False), np.int32)
            assert ids.opens(tokens) == output_format.opens_reasoning(prompt)


def test_an_effort_is_a_switch_and_a_budget(tmp_path):
    folder = write(tmp_path, FAMILIES["glm_47"], "Wait")  # whose prompts open the reasoning, or have it closed
    with LLM(folder, **OPTIONS) as llm:
        end = llm.tokenizer.thinking_ids.end
        # Never of the model's own accord.
        params = SamplingParams(temperature=0, max_tokens=21, ignore_eos=True, logit_bias={end: -100})

        def chat(some=params, **options):
            [output] = llm.chat(chat_templates.QUESTION, some, use_tqdm=False, **options)
            return output.prompt, output.outputs[0].token_ids

        for effort, budget in (("minimal", 2), ("low", 4), ("medium", 10), ("high", 16)):
            prompt, tokens = chat(reasoning_effort=effort)
            assert (prompt, tokens) == chat(dataclasses.replace(params, thinking_budget=budget), thinking=True)
            assert tokens.index(end) == budget
        prompt, tokens = chat(reasoning_effort="none")
        assert (prompt, tokens) == chat(dataclasses.replace(params, thinking_budget=0), thinking=False)
        assert end not in tokens
        _, tokens = chat(dataclasses.replace(params, thinking_budget=3), reasoning_effort="high")
        assert tokens.index(end) == 3
        _, tokens = chat(reasoning_effort="none", thinking=True)
        assert tokens.index(end) == 0
        with pytest.raises(ValueError, match=r"prompt 0: min_thinking_tokens .* thinking_budget = 4"):
            chat(dataclasses.replace(params, min_thinking_tokens=5), reasoning_effort="low")


@pytest.mark.parametrize(
    ("effort", "values", "budget"),
    [
        ("none", {}, 0),
        ("minimal", {}, (INFO.max_model_len - 10) // 10),
        ("low", {"max_tokens": 14}, 2),
        ("medium", {"max_tokens": 1}, 0),
        ("high", {"max_tokens": 10**9}, (INFO.max_model_len - 10) * 8 // 10),
        ("high", {"max_tokens": 20, "thinking_budget": 20}, 20),
        ("high", {"thinking_budget": 0}, 0),
        (None, {}, None),
    ],
)
def test_the_budget_of_an_effort(tmp_path, effort, values, budget):
    chat = Chat(messages=chat_templates.QUESTION, reasoning_effort=effort)
    text = ChatText(fields={"messages": "[]"} if effort is None else {"messages": "[]", "reasoning_effort": effort})
    info, params = dataclasses.replace(INFO, vocab_size=1000), SamplingParams(**values)
    tokenizers = {}
    for family in ("qwen3", "gpt_oss", "granite_4"):
        (tmp_path / family).mkdir()
        tokenizers[family] = Tokenizer.open(chat_templates.write(tmp_path / family, FAMILIES[family]))
    for prompt in (chat, text):
        found = with_effort(params, prompt, 10, info, tokenizers["qwen3"])
        assert found == dataclasses.replace(params, thinking_budget=budget)
        assert with_effort(params, prompt, 10, info, tokenizers["gpt_oss"]) == params
        assert with_effort(params, prompt, 10, info, tokenizers["granite_4"]) == params
    for prompt in ("text", [1, 2]):
        assert with_effort(params, prompt, 10, info, tokenizers["qwen3"]) == params
    own = dataclasses.replace(chat, chat_template="{{ reasoning_effort }}")
    assert with_effort(params, own, 10, info, tokenizers["qwen3"]) == params


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        (".", True), ("end.", True), (' it!"', True), ("?)\n", True), ("\n\n", True), ("。", True), ("x;", True),
        (",", False), (" ", False), ("3.1", False), ('"', False), ("", False), ("\ufffd", False),
    ],
)  # fmt: skip
def test_sentences(text, ends):
    assert sentences.ends_sentence(text) is ends


def test_white_space_and_sentences_of_vocabularies(tmp_path):
    tokenizer = Tokenizer.open(chat_templates.write(tmp_path, FAMILIES["qwen3"]))
    ids = tokenizer.thinking_ids
    assert {tokenizer.token_text(token) for token in ids.spaces} >= {" ", "\n", "\t"}
    assert {tokenizer.token_text(token) for token in ids.sentence_ends} == {".", "!", "?", ";", "\n"}


@pytest.mark.parametrize(
    ("family", "values", "error"),
    [
        (
            "granite_4",
            {"thinking_budget": 5},
            "thinking_budget must be unset .* 'granite_4' has no reasoning; .* max_tokens",
        ),
        ("qwen3", {"min_thinking_tokens": 5}, "min_thinking_tokens must be 0 .* no token .* 'Wait', got 5"),
        ("qwen3", {"thinking_budget": 9, "min_thinking_tokens": 5}, "min_thinking_tokens must be 0"),
        (None, {"thinking_budget": 5}, "thinking_budget needs a tokenizer"),
        (None, {"min_thinking_tokens": 5}, "min_thinking_tokens needs a tokenizer"),
    ],
)
def test_models_that_cannot_be_controlled_refuse(tmp_path, family, values, error):
    tokenizer = None if family is None else Tokenizer.open(chat_templates.write(tmp_path, FAMILIES[family]))
    with pytest.raises(ValueError, match=error):
        check_params(SamplingParams(**values), INFO, tokenizer)
    if family == "qwen3":
        check_params(SamplingParams(thinking_budget=5, thinking_grace=2), INFO, tokenizer)
        with pytest.raises(ValueError, match="ends reasoning with '</think>', which is no single token"):
            check_params(SamplingParams(thinking_budget=5), dataclasses.replace(INFO, vocab_size=200), tokenizer)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        (
            {"thinking_budget": -1},
            r"thinking_budget must be None \(no limit\) or an integer in \[0, 1073741824\], got -1",
        ),
        ({"thinking_budget": 2.0}, "thinking_budget"),
        ({"thinking_budget": True}, "thinking_budget"),
        ({"thinking_grace": 3}, "thinking_grace 3 has no effect without thinking_budget"),
        ({"thinking_budget": 1, "thinking_grace": -1}, "thinking_grace must be an integer"),
        ({"min_thinking_tokens": -1}, "min_thinking_tokens must be an integer"),
        ({"min_thinking_tokens": 6, "thinking_budget": 5}, r"in \[0, thinking_budget = 5\], got 6"),
    ],
)
def test_bad_limits_are_refused(values, error):
    with pytest.raises(ValueError, match=error):
        SamplingParams(**values)
