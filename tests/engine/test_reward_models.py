"""Reward models and classifiers against transformers, and against a small implementation of the heads that only the hub has."""

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_checkpoints as tiny
from helpers.conservation import conserved_tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, Qwen2Config, Qwen2Model

import expertwire
from expertwire import LLM, SamplingParams
from expertwire.engine.frontend.verifier_calls import VerifierCalls
from expertwire.strategies import BeamSearch, BestOfN, VerifierPolicy
from expertwire.strategies.verifiers import Candidate, VerifierError
from expertwire.verifiers import RewardModel, YesNo

PROMPTS = [tiny.prompt(length, seed=length) for length in (1, 17, 70)]
OPTIONS = {
    "dtype": "float32",
    "max_model_len": 512,
    "kv_cache_memory_bytes": 1 << 24,
    "max_num_seqs": 8,
    "threads_per_rank": 1,
}


def classifier(folder, kind, num_labels):
    """Write a classifier with the decoder of a tiny model; return transformers' model."""
    tiny.make(kind, folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = [config["architectures"][0].replace("CausalLM", "SequenceClassification")]
    config["id2label"] = {str(label): f"LABEL_{label}" for label in range(num_labels)}
    config["label2id"] = {name: int(label) for label, name in config["id2label"].items()}
    if num_labels == 2:
        del config["id2label"], config["label2id"]
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    width = tensors.pop("lm_head.weight").shape[1]
    tensors["score.weight"] = torch.randn(num_labels, width, generator=torch.Generator().manual_seed(1))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("kind", "num_labels", "ep_size"),
    [("qwen3", 1, 1), ("qwen3_moe", 2, 2), pytest.param("mixtral", 5, 1, marks=pytest.mark.slow)],
)
def test_a_classifier_gives_the_scores_of_transformers(tmp_path, kind, num_labels, ep_size):
    model = classifier(tmp_path, kind, num_labels)
    with LLM(tmp_path, ep_size=ep_size, **OPTIONS) as llm:
        assert llm.model_info.num_labels == num_labels
        scores = llm.reward(PROMPTS, use_tqdm=False)
        again = llm.reward([PROMPTS[2] + PROMPTS[1]], use_tqdm=False)
        assert ep_size > 1 or llm.stats()["cached_tokens"] == 64, "a longer text finds what a shorter one has computed"
        with pytest.raises(ValueError, match=r"scores texts and generates none: use LLM\.reward"):
            llm.generate(PROMPTS, SamplingParams(max_tokens=2), use_tqdm=False)
    for ids, found in zip([*PROMPTS, PROMPTS[2] + PROMPTS[1]], [*scores, *again], strict=True):
        with torch.no_grad():
            wanted = model(torch.tensor([ids])).logits[0].numpy()
        assert found.shape == (num_labels,)
        np.testing.assert_allclose(found, wanted, atol=1e-4)


def qwen_reward_model(folder, architecture, num_labels):
    """Write a checkpoint; return the function from tokens to scores at every position, f32 [T, labels].

    The hub's code is a Qwen2 decoder, and on it `score`, a linear layer, ReLU and another one, all with biases.
    """
    config = Qwen2Config(
        vocab_size=320, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=False,
    )  # fmt: skip
    decoder = Qwen2Model(config).float().eval()
    tiny._scale_weights(decoder, seed=0)
    generator = torch.Generator().manual_seed(2)
    head = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, num_labels))
    with torch.no_grad():
        for values in head.parameters():
            values.copy_(torch.randn(values.shape, generator=generator) * 0.3)
    tensors = {f"model.{name}": values for name, values in decoder.state_dict().items()}
    tensors |= {f"score.{name}": values for name, values in head.state_dict().items()}
    save_file({name: values.contiguous() for name, values in tensors.items()}, folder / "model.safetensors")
    fields = config.to_dict() | {"architectures": [architecture], "torch_dtype": "float32", "rope_theta": 1e4}
    fields = {name: value for name, value in fields.items() if name not in ("rope_parameters", "dtype", "layer_types")}
    (folder / "config.json").write_text(json.dumps(fields))
    tiny._write_tokenizer("qwen3", folder)

    def scores(ids):
        with torch.no_grad():
            return head(decoder(torch.tensor([ids])).last_hidden_state[0]).numpy()

    return scores


def test_a_reward_head(tmp_path):
    reference = qwen_reward_model(tmp_path, "Qwen2ForRewardModel", 1)
    with LLM(tmp_path, **OPTIONS) as llm:
        check_rewards(llm, reference)


def check_rewards(llm, reference):
    for ids, found in zip(PROMPTS, llm.reward(PROMPTS, use_tqdm=False), strict=True):
        np.testing.assert_allclose(found, reference(ids)[-1], atol=1e-4)


def candidate(text, prompt="one and one?"):
    return Candidate(prompt=prompt, text=text, prompt_token_ids=(), token_ids=(), complete=True)


def test_steps_are_scored_by_the_probability_of_the_last_label_at_their_marks(tmp_path):
    reference = qwen_reward_model(tmp_path, "Qwen2ForProcessRewardModel", 2)
    with LLM(tmp_path, block_size=16, **OPTIONS) as llm:
        verifier = RewardModel(llm=llm, system="judge", step_text="; ", step_token="!")
        [mark] = llm.tokenizer.encode("!", add_special_tokens=False)
        whole = verifier.prompt(candidate("the one; then; another"))
        ends = [i for i, token in enumerate(whole) if token == mark]
        assert len(ends) == 3
        assert whole[-1] == mark
        wanted = torch.softmax(torch.tensor(reference(whole)[ends]), dim=-1)[:, 1].numpy()
        found = [verifier([candidate(text)])[0] for text in ("the one", "the one; then; ", "the one; then; another")]
        np.testing.assert_allclose(found, wanted, atol=1e-4)
        stats = llm.stats()
        assert stats["prompt_tokens"] - stats["cached_tokens"] < len(whole) + 2 * 16, "known steps are computed once"
        check_rewards(llm, reference)
        with pytest.raises(VerifierError, match="no step yet"):
            verifier([candidate(" ")])
        for wrong, message in (
            ({"step_text": "; "}, "step_text and step_token must both be None or texts"),
            ({"step_text": "; ", "step_token": "<extra_0>"}, "step_token must be one token"),
        ):
            with pytest.raises(ValueError, match=message):
                RewardModel(llm=llm, **wrong)


@pytest.mark.parametrize("labels", [{}, ["good"], {str(label): "" for label in range(65)}])
def test_labels_that_cannot_be_served_are_refused(tmp_path, labels):
    classifier(tmp_path, "qwen3", 2)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": labels}))
    with pytest.raises(ValueError, match="id2label must"):
        LLM(tmp_path, **OPTIONS)


def test_a_language_model_has_no_labels_and_says_yes_or_no():
    folder = tiny.cached("qwen3")
    with LLM(folder, **OPTIONS) as llm:
        with pytest.raises(ValueError, match="generates text and has no labels"):
            llm.reward(PROMPTS, use_tqdm=False)
        question, asked = "{prompt} {text}?", candidate("{two}", prompt="{one}")
        ids = YesNo(llm=llm, question=question).prompt(asked)
        assert "{one} {two}?" in llm.tokenizer.decode(ids)
        probabilities = torch.softmax(torch.tensor(tiny.reference_logits(folder, ids)[-1]), dim=-1)
        mass = {}
        for token in probabilities.topk(64).indices.tolist():
            word = llm.tokenizer.token_text(token).strip().lower() if token < 297 else ""
            mass[word] = mass.get(word, 0.0) + float(probabilities[token])
        yes, no = [word for word in mass if word][:2]
        found = YesNo(llm=llm, question=question, yes=yes, no=no)([asked])
        assert found == pytest.approx([mass[yes] / (mass[yes] + mass[no])], abs=1e-4)
        with pytest.raises(VerifierError, match="neither 'yes' nor 'no'"):
            YesNo(llm=llm)([candidate("two")])
        with pytest.raises(ValueError, match="question must have"):
            YesNo(llm=llm, question="{prompt}")
        with pytest.raises(ValueError, match="llm must be a reward model"):
            RewardModel(llm=llm)


def both_stats(*llms):
    for llm in llms:
        llm.stats()  # what is on its way comes before its answer
    return [llm.stats() for llm in llms]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["reward", "process reward", "yes or no"])
def test_a_verifiers_tokens_count_as_its_groups(tmp_path, kind):
    """Tokens that the verifier's engine computes are those that groups and statistics call the verifier's."""
    labels = 2 if kind == "process reward" else 1
    if kind != "yes or no":
        name = "Qwen2ForRewardModel" if labels == 1 else "Qwen2ForProcessRewardModel"
        qwen_reward_model(tmp_path, name, labels)
    folder = tiny.cached("qwen3") if kind == "yes or no" else tmp_path
    demo = Path(expertwire.__file__).with_name("demo_model")
    with LLM(demo, load_format="mock", max_num_seqs=16) as llm, LLM(folder, block_size=16, **OPTIONS) as judge:
        if kind == "reward":
            verifier = RewardModel(llm=judge)
        elif kind == "process reward":
            verifier = RewardModel(llm=judge, step_text=";", step_token="!")
        else:
            verifier = YesNo(llm=judge, yes="one", no="two")  # whether these are probable depends on the output
        policy = VerifierPolicy(on_failure="zero", timeout_s=300)
        best = BestOfN(4, verifier=verifier, verifier_policy=policy)
        beams = BeamSearch(4, 2, verifier=verifier, verifier_policy=policy, step_text=";", max_steps=3)
        judge_before = judge.stats()
        params = SamplingParams(max_tokens=40, ignore_eos=True, seed=5)
        prompts = ["SUM 40 70 15 61 ?", "SUM 2 3 ?", "SUM 9 9 4 1 ?"]
        with conserved_tokens(llm.stats):
            outputs = llm.generate(prompts, params, strategy=[best, beams, best], use_tqdm=False)
        after, judge_after = both_stats(llm, judge)
    computed = judge_after["tokens_computed"] - judge_before["tokens_computed"]
    of_groups = sum(output.group.tokens.verifier for output in outputs)
    assert of_groups == after["groups"]["tokens_verifier"] == computed > 0
    assert judge_after["cached_tokens"], "what was computed of an output is not computed again"
    for fate in ("kept", "pruned"):
        assert sum(getattr(output.group.tokens, fate) for output in outputs) == after["groups"].get(f"tokens_{fate}", 0)


def test_tokens_of_a_failed_call_count():
    error = VerifierError("it fails", [3, 4])

    def fails(candidates):
        raise error

    calls, found = VerifierCalls(), []
    for group in (1, 2):
        calls.ask(fails, VerifierPolicy(), group, candidate("a"), found.append)
    calls.dispatch()
    deadline = time.monotonic() + 60
    while len(found) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
        calls.deliver()
    calls.close()
    # Both together, and then, for each group alone, with a number for another candidate, which says nothing.
    assert [(outcome.score, outcome.num_tokens) for outcome in found] == [(error, 3), (error, 4)]
    assert calls.num_tokens == 7


def test_candidates_that_come_during_the_only_call_share_the_next():
    released, sizes = threading.Event(), []

    class OneAtATime:
        max_calls = 1

        def __call__(self, candidates):
            sizes.append(len(candidates))
            released.wait(60)
            return [0.0] * len(candidates)

    calls, found, verifier = VerifierCalls(), [], OneAtATime()
    for group in range(4):
        calls.ask(verifier, VerifierPolicy(), group, candidate("a"), found.append)
        calls.dispatch()
    released.set()
    deadline = time.monotonic() + 60
    while len(found) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
        calls.deliver()
    calls.close()
    assert sizes == [1, 3]
