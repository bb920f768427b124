"""The shipped demo model is whole and does its task; its measurement does what it says."""

import json
from types import SimpleNamespace

import pytest
from safetensors import safe_open

from expertwire.bench.demo.accuracy import DEMO_MODEL, TransformersLLM, mean_share, measure, table, vote
from expertwire.deploy.demo_task import make_problem


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


@pytest.mark.parametrize("name", ["demo_model_small", "demo_model_thinking"])
def test_the_other_checkpoints_are_small_and_share_the_vocabulary(name):
    folder = DEMO_MODEL.with_name(name)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3e6
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / file).read_bytes() == (DEMO_MODEL / file).read_bytes()


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
