"""Every architecture against transformers, from a checkpoint with the hub's tensors: logits at every position, greedy tokens, and
the same bits whole, chunked, and at any number of ranks."""

import numpy as np
import pytest
import transformers
from helpers import architectures, architectures_hybrid, chat_templates
from helpers import tiny_checkpoints as tiny
from helpers.rank_model import RankModel, logits_of_rank
from helpers.ranks import Ranks
from helpers.slow import slow_but

from expertwire.engine.frontend.chat import Chat
from expertwire.engine.frontend.tokenizer import Tokenizer
from expertwire.engine.models.registry import read_model_config

NAMES = list(architectures.all_of_them())
MOSTLY_SLOW = slow_but(("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"), NAMES)
LENGTHS = (1, 17, 70, 300)
TOLERANCE, NEAR_TIE, ROUTER_MARGIN = 1e-3, 2e-3, 2e-4
NUM_TOKENS = 32


def prompt(watched, near_tie, length):
    """One on which rounding changes no expert."""
    for draw in range(100):
        ids = tiny.prompt(length, seed=1000 * length + draw)
        watched.logits(ids)
        if not near_tie():
            return ids
    raise AssertionError(f"no prompt of {length} tokens keeps away from ties")


@pytest.mark.parametrize("name", MOSTLY_SLOW)
def test_logits(name):
    folder = architectures.folder(name)
    is_hybrid = name in architectures_hybrid.ALL
    lengths = (*LENGTHS, 600) if is_hybrid else LENGTHS  # many chunks of a recurrence
    watched, rank_model = (RankModel(folder, max_tokens=640 if is_hybrid else 512) for _ in range(2))
    near_tie = watched.watch_routers(ROUTER_MARGIN)
    for length in lengths:
        ids = prompt(watched, near_tie, length)
        expected = architectures.reference_logits(name, ids)
        whole = rank_model.logits(ids)
        assert expected.std() > 1, f"logits of spread {expected.std()} say little"
        assert np.abs(whole - expected).max() <= TOLERANCE, f"{length} tokens: {np.abs(whole - expected).max(1)}"
        for chunk in (7, 64):
            assert np.array_equal(rank_model.logits(ids, chunk), whole), f"{length} tokens, {chunk} at a time"


@pytest.mark.parametrize("name", MOSTLY_SLOW)
def test_greedy_tokens(name):
    folder = architectures.folder(name)
    watched = RankModel(folder)
    near_tie, rank_model = watched.watch_routers(ROUTER_MARGIN), RankModel(folder)
    for draw in range(100):
        ids = tiny.prompt(41, seed=draw)
        right, closest = architectures.reference_greedy(name, ids, NUM_TOKENS)
        watched.logits(ids + right)
        if closest > NEAR_TIE and not near_tie():
            assert rank_model.greedy(ids, NUM_TOKENS) == right
            return
    raise AssertionError("no prompt keeps away from ties")


@pytest.fixture(scope="module", params=slow_but([2], [2, 4]))
def ranks(request):
    with Ranks(request.param, timeout_s=200) as started:
        yield started


@pytest.mark.parametrize("name", MOSTLY_SLOW)
def test_ranks_give_the_same_bits(name, ranks):
    folder = architectures.folder(name)
    prompts = [tiny.prompt(120, seed=seed) for seed in range(ranks.size)]
    alone = RankModel(folder)
    for ids, found in zip(prompts, ranks.run(logits_of_rank, folder, prompts), strict=True):
        assert np.array_equal(found, alone.logits(ids))


@pytest.mark.parametrize("name", NAMES)
def test_its_chat_template_renders_as_transformers(name):
    folder = architectures.folder(name)
    ours, theirs = Tokenizer.open(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for messages in (chat_templates.QUESTION, chat_templates.TURNS):
        options = {"add_generation_prompt": True, "return_dict": False}
        assert ours.encode_chat(Chat(messages=messages)) == theirs.apply_chat_template(messages, **options)
        text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert ours.render_chat(Chat(messages=messages)) == text
    assert ours.vocab_size <= read_model_config(folder).vocab_size
