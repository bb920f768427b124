"""The sampling kernels: the tokens of a sort with the same integer weights, and those of the reference."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from expertwire.kernels.gpu import sampling as gpu
from expertwire.kernels.gpu import top_k_top_p
from expertwire.kernels.ops import sampling

GREEDY, PLAIN = {"temperature": 0.0}, {}
RULES = [
    GREEDY,
    PLAIN,
    {"temperature": 0.3},
    {"temperature": 5.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 100000},
    {"top_p": 0.6},
    {"top_p": 1e-6},
    {"top_p": 0.999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 1.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 0.7, "top_k": 3, "top_p": 0.99},
    {"temperature": 50.0, "top_k": 40, "top_p": 0.5},
]


@pytest.fixture(autouse=True)
def small_chunks_and_poisoned_memory(monkeypatch):
    monkeypatch.setattr(gpu, "CHUNK_TOKENS", 256)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(-12345))


def columns(rules, seed=0):
    """Return draws by one rule a row."""

    def column(name, default, dtype):
        return torch.tensor([rule.get(name, default) for rule in rules], dtype=dtype)

    rng = np.random.default_rng(seed)
    num = len(rules)
    return sampling.Draws(
        column("temperature", 1.0, torch.float32),
        column("top_k", -1, torch.int64),
        column("top_p", 1.0, torch.float32),
        column("min_p", 0.0, torch.float32),
        torch.from_numpy(rng.integers(-(2**63), 2**63, num)),
        torch.from_numpy(rng.integers(0, 2**20, num)),
        torch.from_numpy(rng.integers(0, 2**40, num)),
    )


def uniform(seed, branch, position):
    return torch.from_numpy(sampling.uniform(seed.numpy(), branch.numpy(), position.numpy()))


def by_sorting(logits, rule, u):
    """Return one row's token by integer weights, sorted by distance and id."""
    if rule.get("temperature", 1.0) == 0 or not np.isfinite(logits.max()):
        return int(logits.argmax())
    distance = (logits.max() - logits) / np.float32(rule.get("temperature", 1.0))
    e = np.exp(-distance)
    weight = (e * np.float32(2.0**40)).astype(np.int64).astype(object)  # Python's integers do not overflow
    order = np.argsort(distance, kind="stable")
    if rule.get("top_k", -1) > 0:
        order = order[: rule["top_k"]]
    if rule.get("top_p", 1.0) < 1:
        before = np.cumsum(weight[order]) - weight[order]
        numerator, denominator = float(np.float32(rule["top_p"])).as_integer_ratio()
        order = order[[i == 0 or int(b) * denominator < weight[order].sum() * numerator for i, b in enumerate(before)]]
    kept = np.sort(order[e[order] >= np.float32(rule.get("min_p", 0.0))])
    cumulative = np.cumsum(weight[kept])
    target = int(u * 2**53) * int(cumulative[-1]) >> 53
    return int(kept[[int(c) > target for c in cumulative].index(True)])


@triton.jit
def bits_kernel(seed_ptr, branch_ptr, position_ptr, bits_ptr):
    i = tl.program_id(0)
    bits = gpu.random_bits(tl.load(seed_ptr + i), tl.load(branch_ptr + i), tl.load(position_ptr + i))
    tl.store(bits_ptr + i, bits.to(tl.int64, bitcast=True))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_random_bits_are_those_of_the_reference():
    *_, seed, branch, position = columns([PLAIN] * 20)
    bits = torch.empty(20, dtype=torch.int64)
    bits_kernel[(20,)](seed, branch, position, bits)
    expected = (uniform(seed, branch, position).numpy() * 2.0**53).astype(np.uint64) << np.uint64(11)
    assert bits.numpy().view(np.uint64).tolist() == expected.tolist()


def check(logits, rules, seed=0, **kwargs):
    arguments = columns(rules, seed)
    done = gpu.sample(logits, arguments, **kwargs)
    u = uniform(*arguments[4:])
    with np.errstate(all="ignore"):
        expected = [by_sorting(row, rule, x) for row, rule, x in zip(logits.numpy(), rules, u.tolist(), strict=True)]
    assert done.tolist() == expected
    return done, arguments[:4], u


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("vocab", [1, 257, 600])
def test_tokens_are_those_of_a_sort_and_of_the_reference(vocab):
    logits = 2 * torch.randn(len(RULES), vocab, generator=torch.Generator().manual_seed(vocab))
    done, parameters, u = check(logits, RULES, vocab)
    assert done.tolist() == sampling.reference(logits, *parameters, u).tolist()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("values", [1, 4])
def test_ties_go_to_the_lowest_ids(values):
    """Use few different logits, so that top-k and top-p end among equals."""
    generator = torch.Generator().manual_seed(values)
    rules = RULES[4:10] + RULES[12:]
    check(torch.randint(0, values, (len(rules), 300), generator=generator).float(), rules, values)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_exact_share_needs_no_further_token():
    """Each of four equals has a quarter: top_p = 0.5 keeps two."""
    rules = [{"top_p": 0.5}] * 6
    done, *_ = check(torch.zeros(6, 4), rules)
    assert set(done.tolist()) == {0, 1}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_banned_tokens_are_never_drawn():
    rules = RULES[1::3]
    logits = torch.full((len(rules), 200), -torch.inf)
    logits[:, 150:153] = torch.tensor([0.1, 0.0, 0.1])
    done, *_ = check(logits, rules)
    assert set(done.tolist()) <= {150, 151, 152}


@triton.jit
def pick_kernel(token_ptr, weight_ptr, picked_ptr, target):
    i = tl.arange(0, 4)
    tl.store(picked_ptr, top_k_top_p.pick(tl.load(token_ptr + i), tl.load(weight_ptr + i), 0, target))


def test_a_token_without_weight_is_not_picked():
    """The smallest random number does not pick it either, and each other token is picked by as many as its weight."""
    token, weight = torch.arange(4, dtype=torch.int32), torch.tensor([0, 3, 0, 2])
    picked = torch.empty(5, dtype=torch.int32)
    for target in range(5):
        pick_kernel[(1,)](token, weight, picked[target:], target)
    assert picked.tolist() == [1, 1, 1, 3, 3]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("values", [[-np.inf], [np.inf], [np.nan], [np.nan, np.inf]])
def test_a_row_without_probabilities_gives_no_token_and_others_the_same_ones(values):
    logits = torch.randn(2 * len(RULES), 100, generator=torch.Generator().manual_seed(3))
    rules = [rule for rule in RULES for _ in range(2)]
    alone = gpu.sample(logits, columns(rules))
    assert (alone >= 0).all()
    for i, value in enumerate(values):
        logits[::2, 7 + 60 * i] = value
    if values == [-np.inf]:
        logits[::2] = -np.inf
    tokens = gpu.sample(logits, columns(rules))
    assert (tokens[::2] == -1).all()
    assert torch.equal(tokens[1::2], alone[1::2])
    assert (gpu.sample(logits, columns(rules), drawn=False)[::2] == -1).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-3])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = torch.randn(4, 200, generator=torch.Generator().manual_seed(1))
    rules = [{"temperature": temperature, **more} for more in ({}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.5})]
    assert gpu.sample(logits, columns(rules)).tolist() == logits.argmax(-1).tolist()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_the_host_knows_changes_launches_not_tokens():
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(2))
    check(logits, [PLAIN, GREEDY, {"min_p": 0.2}], filtered=False)
    check(logits, [GREEDY] * 3, drawn=False)
    assert gpu.sample(logits[:0], columns([])).shape == (0,)


def test_columns_of_another_type_are_refused():
    draws = columns([PLAIN])
    with pytest.raises(AssertionError, match=r"torch.int32, not torch.int64"):
        gpu.sample(torch.zeros(1, 8), draws._replace(top_k_O=draws.top_k_O.int()))
