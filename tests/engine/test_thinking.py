"""Thinking control on a rank: budgets exact to the token in any batch, in chunks, after preemptions and forks.

The model is a table: a token's logits follow from the last token and its position, so that a request alone is a few lines. The
scheduler, the slots, the runner and the sampler are the real ones.
"""

import numpy as np
import pytest
import torch
from helpers.cache_model import SIZES, CacheModel, Server
from helpers.thinking_machine import Limits, Marks, banned, chosen, num_reasoning, split

from expertwire.engine.config.thinking import ThinkingIds
from expertwire.engine.runner.model_runner import ModelRunner
from expertwire.engine.runner.thinking import Thinking
from expertwire.kernels import registry
from expertwire.kernels.ops import sampling
from expertwire.scheduler.request import Request
from expertwire.scheduler.sampling_params import SamplingParams

VOCAB, ROWS = 40, 997
SPACES, EOS = (8, 9), (10, 11)
MODELS = {
    "<think>": Marks((1,), 5, 6, frozenset(EOS), frozenset({12, 13, 14, 15, 16})),
    "<|channel|>analysis<|message|>": Marks((1, 2, 3), 5, 6, frozenset(EOS), frozenset({12, 13, 14, 15, 16})),
}
_TABLE = torch.randn((ROWS, VOCAB), generator=torch.Generator().manual_seed(0))
_TABLE[:, [1, 2, 3, 5]] += 1.5


def logits_after(token, position):
    return _TABLE[(token * 31 + position * 17) % ROWS]


class TableModel(CacheModel):
    """A model that looks at a token and its position only."""

    def _forward(self, batch, _caches):
        return torch.stack((batch.token_ids_T.float(), batch.positions_T.float()), dim=1)

    def logits(self, x_XD):
        return torch.stack([logits_after(*map(int, row)) for row in x_XD.tolist()])


def server_of(marks, *, num_blocks, max_num_seqs, depth, **options):
    model = TableModel(registry.plain())
    caches = model.allocate(num_blocks=num_blocks, **SIZES)
    ids = ThinkingIds(
        start=marks.start, end=marks.end, wait=marks.wait, spaces=SPACES, sentence_ends=tuple(marks.sentence_ends)
    )
    thinking = Thinking(ids, EOS, max_num_seqs=max_num_seqs, vocab_size=VOCAB, device="cpu")
    runner = ModelRunner(model=model, caches=caches, num_ranks=1, max_num_seqs=max_num_seqs, thinking=thinking, **SIZES)
    options |= {"max_num_seqs": max_num_seqs, "vocab_size": VOCAB, "eos_token_ids": EOS, "max_queued_requests": 5000}
    return Server(runner, num_blocks, depth=depth, **options)


def random_params(rng):
    budget = None if rng.random() < 0.15 else int(rng.integers(0, 12))
    most = 12 if budget is None else budget
    return SamplingParams(
        temperature=float(rng.choice([0, 0.7, 1.5])),
        max_tokens=int(rng.integers(1, 32)),
        ignore_eos=bool(rng.random() < 0.3),
        min_tokens=1,
        thinking_budget=budget,
        thinking_grace=0 if budget is None or rng.random() < 0.5 else int(rng.integers(1, 8)),
        min_thinking_tokens=int(rng.integers(0, most + 1)) if rng.random() < 0.5 else 0,
        repetition_penalty=float(rng.choice([1.0, 1.0, 1.3])),
    )


def random_prompt(rng, marks):
    """A prompt, and whether it opens the reasoning."""
    prompt = rng.integers(12, VOCAB, rng.integers(1, 26)).tolist()
    match rng.integers(4):
        case 0:
            return prompt, False
        case 1:
            return [*prompt, *marks.start, marks.end, 9], False
        case _:
            return [*prompt, *marks.start, *SPACES[: rng.integers(3)]], True


def alone(request, marks, is_open, output=()):
    """Return the output of a request that goes on after `output`."""
    params, prompt, output = request.params, request.prompt.tolist(), list(output)
    budget = float("inf") if params.thinking_budget is None else params.thinking_budget
    limits = Limits(budget, params.thinking_grace, params.min_thinking_tokens)
    most = min(params.max_tokens, SIZES["max_model_len"] - len(prompt))
    while len(output) < most and (params.ignore_eos or not {*output[-1:]} & marks.eos):
        tokens = [*prompt, *output]
        logits_V = logits_after(tokens[-1], len(tokens) - 1).clone()
        penalties = {"repetition": params.repetition_penalty, "presence": 0.0, "frequency": 0.0}
        sampling.penalize(logits_V, torch.tensor(prompt), torch.tensor(output, dtype=torch.int64), **penalties)
        if not output and not params.ignore_eos:
            logits_V[list(EOS)] = -torch.inf
        if (token := banned(output, marks, limits, is_open)) is not None:
            logits_V[token] = -torch.inf
        columns = params.temperature, -1, 1.0, 0.0, request.seed, request.branch, len(tokens)
        drawn = int(sampling.sample(logits_V[None], sampling.Draws(*(torch.tensor([value]) for value in columns))))
        output.append(chosen(drawn, output, marks, limits, is_open))
    return output


def check(output, params, marks, is_open):
    """Count what was enforced, having checked the bounds that a client is promised."""
    stretches, still_open, _ = split(output, marks, is_open)
    num = num_reasoning(output, marks, is_open)
    budget = float("inf") if params.thinking_budget is None else params.thinking_budget
    assert num <= budget + params.thinking_grace
    assert still_open or not stretches or num >= params.min_thinking_tokens
    return np.array([num == budget + params.thinking_grace, budget < num, marks.wait in output])


@pytest.mark.parametrize("family", ["<think>", pytest.param("<|channel|>analysis<|message|>", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks": (300,) * 4, "max_num_seqs": 16, "depth": 2, "max_num_batched_tokens": 64},
        {"num_blocks": (30,) * 4, "max_num_seqs": 9, "depth": 2, "max_num_batched_tokens": 16},
        {
            "num_blocks": (22,) * 4,
            "max_num_seqs": 4,
            "depth": 1,
            "max_num_batched_tokens": 7,
            "chunked_prefill_size": 3,
        },
    ],
    ids=["large batches", "preempted", "preempted, chunks of 3"],
)
def test_exact_to_the_token(options, family):
    """A thousand requests in all, some with several branches, and forks of running ones."""
    marks, rng = MODELS[family], np.random.default_rng(len(options) + options["max_num_seqs"])
    server, requests, opened, begun = server_of(marks, **options), {}, {}, {}
    while len(requests) < 168:
        prompt, is_open = random_prompt(rng, marks)
        params, seed = random_params(rng), int(rng.integers(1 << 40))
        for branch in range(rng.integers(1, 4)):
            key = len(requests)
            prompt_ = np.array(prompt, np.int32)
            requests[key] = Request(key=key, prompt=prompt_, params=params, branch=branch, seed=seed)
            opened[key] = is_open
            server.submit(requests[key])
    while not server.scheduler.idle:
        server.step()
        parent = int(rng.integers(168))
        known, params = server.tokens[parent], requests[parent].params
        running = known and len(known) + 2 < params.max_tokens and not {*known} & marks.eos
        if len(begun) < 20 and running and 1000 + parent not in begun:
            child = Request(
                key=1000 + parent, prompt=requests[parent].prompt, params=params, branch=7, seed=requests[parent].seed
            )
            server.fork(parent, child)
            begun[child.key] = list(server.tokens[child.key])
            requests[child.key], opened[child.key] = child, opened[parent]
    server.scheduler.check_integrity()
    counts = np.zeros(3, int)
    for key, request in requests.items():
        expected = alone(request, marks, opened[key], begun.get(key, ()))
        assert server.tokens[key] == expected, f"request {key}: {request.params}"
        counts += check(expected, request.params, marks, opened[key])
    assert (counts > 5).all() and len(begun) > 3, (counts, len(begun))
    preemptions = server.scheduler.stats()["preemptions"]
    assert preemptions == 0 if options["max_num_seqs"] == 16 else preemptions > 5, preemptions
