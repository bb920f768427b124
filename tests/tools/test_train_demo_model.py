"""The demo model's training does what it says, and its vocabulary is that of the shipped tokenizer."""

from pathlib import Path

import pytest
import torch
from demo_batches import MIXES, TOKEN_IDS, Batch, make_batch, token_weights
from demo_network import CONFIGS, DemoConfig, DemoModel
from tokenizers import Tokenizer
from train_demo_model import (
    Recipe,
    Training,
    batch_loss,
    compare_with_transformers,
    learning_rate,
    load_weights,
    save_checkpoint,
)

from expertwire.bench.demo.accuracy import DEMO_MODEL
from expertwire.deploy.demo_task import END_OF_THINKING, EOS, SIZES, WAIT, WORDS, make_example, side_of

SMALL = DemoConfig(hidden_size=32, num_hidden_layers=1, head_dim=8, num_experts=4, moe_intermediate_size=16)


@pytest.fixture(scope="module", params=["demo_model", "demo_model_small", "demo_model_thinking"])
def tokenizer(request):
    return Tokenizer.from_file(str(DEMO_MODEL.with_name(request.param) / "tokenizer.json"))


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


@pytest.mark.parametrize("name", CONFIGS)
def test_the_training_forward_equals_transformers(name, tmp_path):
    pytest.importorskip("transformers")
    model = DemoModel(CONFIGS[name], seed=3)
    save_checkpoint(model, tmp_path)
    largest, equal, total = compare_with_transformers(model, tmp_path, name)
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


@pytest.mark.parametrize("model", MIXES)
def test_batches_follow_from_the_step_and_hold_training_problems_only(model):
    for step in range(20):
        batch = make_batch(model, 0, 512, step)
        assert torch.equal(batch.ids_BS, make_batch(model, 0, 512, step).ids_BS)
        assert not torch.equal(batch.ids_BS, make_batch(model, 1, 512, step).ids_BS)
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


def test_where_any_choice_is_right_all_numbers_of_the_list_in_their_order_are():
    """Which number comes first in a step is open, but for the last one; the second comes behind it in the list."""
    for step in range(10):
        batch = make_batch("small_choices", 0, 256, step)
        assert batch.others_BSV is not None
        words = [WORDS[token_id] for token_id in batch.ids_BS[0].tolist()]
        left, solution = words[1 : batch.first - 1], words[batch.first :]
        right = [sorted(WORDS[i] for i in row.nonzero().flatten().tolist()) for row in batch.others_BSV[0] if row.any()]
        taken = [(solution[i - 1], solution[i + 1]) for i, word in enumerate(solution) if word == "+"]
        assert right[0] == sorted(set(left[:-1]))
        assert right[1] == sorted(set(left[left.index(taken[0][0]) + 1 :]))
        assert len(right) == 2 * len(taken)
        assert all(first in firsts for (first, _), firsts in zip(taken, right[::2], strict=True))
        assert all(second in seconds for (_, second), seconds in zip(taken, right[1::2], strict=True))


def test_any_right_choice_has_the_same_loss():
    model, ids_BS = DemoModel(SMALL, seed=1), torch.tensor([[5, 30, 31, 32]])
    others_BSV = torch.zeros(1, 2, len(WORDS), dtype=torch.bool)
    others_BSV[0, 1, [32, 33, 34]] = True

    def loss(target: int) -> float:
        ids_BS[0, -1] = target
        return batch_loss(model, Batch(ids_BS.clone(), 2, torch.tensor([0.0, 1.0]), others_BSV), 0.0).item()

    assert loss(32) == loss(33) == loss(34)
    logits_BSV, _ = model(ids_BS[:, :-1])
    assert loss(32) == pytest.approx(-logits_BSV[0, -1].softmax(-1)[32:35].sum().log().item(), rel=1e-5)


def test_the_learning_rate_rises_stays_and_falls():
    recipe = Recipe(tokens=1, lr=1.0, warmup=0.1, decay_from=0.5)
    rates = [learning_rate(recipe, progress) for progress in (0.0, 0.05, 0.1, 0.5, 0.75, 1.0)]
    assert rates == pytest.approx([0, 0.5, 1, 1, 0.5, 0])


def test_a_training_can_start_from_a_checkpoint(tmp_path):
    model = DemoModel(SMALL, seed=5)
    save_checkpoint(model, tmp_path)
    other = DemoModel(SMALL, seed=6)
    load_weights(other, tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight.bfloat16().float(), other.state_dict()[name]), name


def test_the_thinking_model_learns_to_be_cut_and_to_begin_again_and_not_when():
    """Words that a server forces have no weight: the model must not say them by itself."""
    seen, said = {"cut": 0, "again": 0}, 0
    for step in range(60):
        batch = make_batch("thinking", 0, 256, step)
        words = [WORDS[token_id] for token_id in batch.ids_BS[0, batch.first :].tolist()]
        weights = dict(zip(range(len(words)), batch.weights_S.tolist(), strict=True))
        end = words.index(END_OF_THINKING)
        whole = words[1:end].count(";") >= batch.first - 3 and words[end - 1] == ";"
        assert whole or weights[end] == 0
        said += weights[end] == 1
        assert all(weights[i] == 0 for i, word in enumerate(words) if word == WAIT)
        assert all(weights[i] == 1 for i in range(end + 1, len(words)))
        seen["cut"] += not whole
        seen["again"] += WAIT in words
    assert min(*seen.values(), said) >= 3
