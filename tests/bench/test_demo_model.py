"""The shipped demo model is whole and does its task; its training and its measurement do what they say."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from expertwire.bench.demo.accuracy import DEMO_MODEL, TransformersLLM, mean_share, measure, table, vote
from expertwire.bench.demo.network import CONFIGS, DemoConfig, DemoModel
from expertwire.bench.demo.train import (
    TOKEN_IDS,
    Recipe,
    Training,
    compare_with_transformers,
    learning_rate,
    make_batch,
    save_checkpoint,
    token_weights,
)
from expertwire.deploy.demo_task import EOS, SIZES, WORDS, make_example, make_problem, side_of

SMALL = DemoConfig(hidden_size=32, num_hidden_layers=1, head_dim=8, num_experts=4, moe_intermediate_size=16)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))


def test_the_checkpoint_is_in_the_hubs_format_and_small():
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    layer, expert = "model.layers.2.mlp", "model.layers.2.mlp.experts.7"
    with safe_open(DEMO_MODEL / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a mapping
        dtypes = {file.get_slice(name).get_dtype() for name in shapes}
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert dtypes == {"BF16"}
    assert len(shapes) == 2 + 3 * (9 + 8 * 3)
    assert shapes[f"{layer}.gate.weight"] == [8, 128]
    assert shapes[f"{expert}.gate_proj.weight"] == shapes[f"{expert}.up_proj.weight"] == [96, 128]
    assert shapes[f"{expert}.down_proj.weight"] == [128, 96]
    assert sum(path.stat().st_size for path in DEMO_MODEL.iterdir()) < 3e6


def test_the_tokenizer_gives_back_every_text(tokenizer):
    for kind, sizes in SIZES.items():
        for size in sizes:
            problem, solution = make_example(kind, size, 0)
            text = f"{problem.prompt} {solution}"
            ids = tokenizer.encode(text).ids
            assert ids == [TOKEN_IDS[word] for word in text.split()]
            assert tokenizer.decode(ids) == text
    assert tokenizer.get_vocab() == TOKEN_IDS
    assert [tokenizer.id_to_token(i) for i in tokenizer.encode("SUM 3+92? <think> 100<eos>").ids] == [
        *("SUM", "3", "+", "92", "?", "<think>", "<unk>", "<eos>")
    ]
    assert tokenizer.decode([TOKEN_IDS["7"], TOKEN_IDS[EOS]]) == "7"


def test_a_chat_becomes_a_prompt():
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)
    for content in ("SUM 3 14 15 92", " SUM 3 14 15 92 ?", "SUM 3 14 15 92?"):
        ids = tokenizer.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        assert tokenizer.decode(ids["input_ids"]) == "SUM 3 14 15 92 ?"


def test_the_model_adds_three_numbers_through_transformers():
    pytest.importorskip("transformers")
    (row,) = measure(TransformersLLM(DEMO_MODEL, "float32"), bins=[("SUM", 3)], problems=20, samples=2)
    assert row.greedy.mean >= 0.9
    assert row.pass_1.mean >= 0.7
    assert 15 < row.tokens < 25


@pytest.mark.parametrize("name", CONFIGS)
def test_the_training_forward_equals_transformers(name, tmp_path):
    pytest.importorskip("transformers")
    model = DemoModel(CONFIGS[name], seed=3)
    save_checkpoint(model, tmp_path)
    largest, equal, total = compare_with_transformers(model, tmp_path)
    assert largest < 1e-4
    assert equal == total > 1000


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path):
    recipe = Recipe(tokens=6 * 256, batch_tokens=256)
    whole = Training(SMALL, recipe)
    whole.run()
    first = Training(SMALL, recipe, tmp_path / "state.pt")
    first.advance()
    first.advance()
    first.save()
    second = Training(SMALL, recipe, tmp_path / "state.pt")
    assert second.step == 2
    second.run()
    assert (second.step, second.tokens) == (whole.step, whole.tokens)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, second.model.state_dict()[name]), name
    with pytest.raises(ValueError, match="belongs to another run"):
        Training(SMALL, Recipe(tokens=7 * 256, batch_tokens=256), tmp_path / "state.pt")


def test_training_lowers_the_loss():
    training = Training(SMALL, Recipe(tokens=10**9, batch_tokens=256, warmup=1e-9))
    losses = [training.advance() for _ in range(60)]
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


@pytest.mark.parametrize("budget", [{}, {"tokens": 1, "cpu_seconds": 1.0}])
def test_a_run_has_one_budget(budget):
    with pytest.raises(ValueError, match="one of tokens and cpu_seconds"):
        Training(SMALL, Recipe(**budget))


def test_batches_follow_from_the_step_and_hold_training_problems_only():
    recipe = Recipe(tokens=1, batch_tokens=512)
    for step in range(20):
        batch = make_batch(recipe, step)
        assert torch.equal(batch.ids_BS, make_batch(recipe, step).ids_BS)
        assert not torch.equal(batch.ids_BS, make_batch(Recipe(tokens=1, seed=1, batch_tokens=512), step).ids_BS)
        for ids in batch.ids_BS.tolist():
            words = [WORDS[token_id] for token_id in ids]
            kind, *numbers = words[: words.index("TO") if "TO" in words else batch.first - 1]
            assert side_of(kind, tuple(map(int, numbers))) == "train"
            assert words[batch.first - 1] == "?"
            assert words[-1] == EOS


def test_arbitrary_choices_weigh_less():
    text = "14 + 3 = 17 : 15 17 ; 15 + 17 = 32 : 32 ; answer 32"
    words = [*text.split(), EOS]
    light = [i for i, weight in enumerate(token_weights("SUM", words)) if weight < 1]
    assert light == [0, 2, 9, 11]
    assert set(token_weights("COUNTDOWN", words)) == {1.0}


def test_the_learning_rate_rises_stays_and_falls():
    recipe = Recipe(tokens=1, lr=1.0, warmup=0.1, decay_from=0.5)
    rates = [learning_rate(recipe, progress) for progress in (0.0, 0.05, 0.1, 0.5, 0.75, 1.0)]
    assert rates == pytest.approx([0, 0.5, 1, 1, 0.5, 0])


class _FakeLLM:
    """Answers as told: `answer(problem number, branch, greedy)` says whether right."""

    def __init__(self, right):
        self.right = right

    def generate(self, prompts, sampling_params):
        assert prompts == [make_problem("SUM", 3, i).prompt for i in range(len(prompts))]
        outputs = []
        for i, params in enumerate(sampling_params):
            answer = make_problem("SUM", 3, i).answer
            texts = [
                f"answer {answer if self.right(i, j, params.temperature == 0) else (answer + 1 + j) % 100}"
                for j in range(params.n)
            ]
            outputs.append(SimpleNamespace(outputs=[SimpleNamespace(text=text, token_ids=(1, 2)) for text in texts]))
        return outputs


def test_measure_counts_what_an_engine_answers():
    llm = _FakeLLM(lambda problem, branch, greedy: problem < 4 if greedy else branch < (2 if problem < 8 else 1))
    (row,) = measure(llm, bins=[("SUM", 3)], problems=16, samples=4)
    assert row.greedy.mean == 0.25
    assert row.greedy.error == pytest.approx((0.25 * 0.75 / 16) ** 0.5)
    assert row.pass_1.mean == pytest.approx((8 * 0.5 + 8 * 0.25) / 16)
    assert row.pass_1.error == pytest.approx(0.125 / 4)
    assert (row.pass_n.mean, row.tokens) == (1.0, 2.0)
    assert row.majority.mean == 1.0  # two of four agree, or the first of four different answers
    assert "| SUM-3 | 0.250±0.108 |" in table([row])


def test_votes():
    assert vote(["answer 1", "answer 2", "answer 2", "3"]) == 2
    assert vote(["answer 2", "answer 1"]) == 2
    assert vote(["", "1"]) is None
    assert mean_share([0.0, 1.0]).error == pytest.approx(0.5 / 2**0.5)
