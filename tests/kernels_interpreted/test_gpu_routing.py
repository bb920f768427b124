"""The routing kernel against its reference: every rule, ties, and NaN logits."""

import pytest
import torch

from expertwire.kernels.gpu import routing as gpu
from expertwire.kernels.ops import routing
from expertwire.kernels.ops.variants import ExpertGroups, Routing

V2 = ExpertGroups(number=8, kept=3, by="best")
V3 = ExpertGroups(number=4, kept=2, by="two_best")
RULES = {
    "softmax": ({"renormalize": False}, 128, 8),
    "renormalized": ({"renormalize": True}, 8, 2),
    "odd": ({"renormalize": True, "scale": 2.5}, 60, 6),
    "biased softmax": ({"renormalize": True, "bias_E": True}, 24, 3),
    "deepseek v2": ({"renormalize": False, "scale": 16.0, "groups": V2}, 160, 6),
    "deepseek v3": ({"renormalize": True, "score": "sigmoid", "bias_E": True, "scale": 2.5, "groups": V3}, 64, 8),
    "kimi": ({"renormalize": True, "score": "sigmoid", "bias_E": True}, 384, 8),
    "nemotron": ({"renormalize": True, "score": "sigmoid", "bias_E": True}, 512, 22),
    "deepseek v4": ({"renormalize": True, "score": "sqrt_softplus", "bias_E": True}, 32, 6),
    "llama 4": ({"renormalize": False, "score": "sigmoid"}, 16, 1),
    "all": ({"renormalize": True}, 5, 5),
    "one": ({"renormalize": True}, 1, 1),
}


def arguments(name, generator):
    """Return the rule, the bias and the number of experts."""
    rule, experts, top_k = RULES[name]
    rule = dict(rule)
    bias = 0.5 * torch.randn(experts, generator=generator) if rule.pop("bias_E", False) else None
    return Routing(top_k=top_k, **rule), bias, experts


def check(logits, rule, bias=None):
    ids, weights = gpu.route(logits, rule, bias)
    expected_ids, expected = routing.reference(logits, rule, bias)
    assert ids.tolist() == expected_ids.tolist()
    torch.testing.assert_close(weights, expected, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 19])
def test_every_rule(name, dtype, tokens):
    generator = torch.Generator().manual_seed(tokens)
    rule, bias, experts = arguments(name, generator)
    check((3 * torch.randn(tokens, experts, generator=generator)).to(dtype), rule, bias)


@pytest.mark.parametrize("name", RULES)
def test_ties_go_to_the_lowest_id(name):
    generator = torch.Generator().manual_seed(1)
    rule, bias, experts = arguments(name, generator)
    if bias is not None:
        bias = bias.round()
    few_values = torch.randint(-1, 2, (6, experts), generator=generator).float()
    few_values[0] = 0.0
    few_values[:, ::2] *= -1  # both zeros in a row
    check(few_values, rule, bias)


def test_extreme_logits():
    logits = torch.tensor([[1e4, -1e4, 0.0, 9999.0], [-1e30, -1e30, -1e30, -torch.inf]])
    for renormalize in (False, True):
        check(logits, Routing(top_k=3, renormalize=renormalize))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_whatever_the_logits_ids_are_distinct_experts(name, value):
    rule, bias, experts = arguments(name, torch.Generator().manual_seed(2))
    logits = torch.zeros(4, experts)
    logits[1:] = value
    logits[3, ::2] = 1.0
    ids, _ = gpu.route(logits, rule, bias)
    assert all(len(set(row)) == rule.top_k and set(row) <= set(range(experts)) for row in ids.tolist())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", ["renormalized", "odd", "kimi", "deepseek v4"])
def test_nan_is_chosen_last(name):
    generator = torch.Generator().manual_seed(5)
    rule, bias, experts = arguments(name, generator)
    logits = torch.randn(4, experts, generator=generator)
    logits[:, : experts - rule.top_k] = torch.nan
    ids, _ = gpu.route(logits, rule, bias)
    assert ids.sort().values.tolist() == [list(range(experts - rule.top_k, experts))] * 4


def test_rows_of_a_wider_tensor():
    wide = torch.randn(7, 40, generator=torch.Generator().manual_seed(3))
    check(wide[:, :32], Routing(top_k=4, renormalize=True))


def test_a_tokens_bits_do_not_depend_on_its_neighbours():
    logits = torch.randn(20, 40, generator=torch.Generator().manual_seed(4))
    rule = Routing(top_k=4, renormalize=True)
    whole = gpu.route(logits, rule)
    for t in range(20):
        alone = gpu.route(logits[t : t + 1], rule)
        assert torch.equal(alone[0][0], whole[0][t])
        assert torch.equal(alone[1][0], whole[1][t])


@pytest.mark.parametrize("replicas", [None, 1, 3])
@pytest.mark.parametrize("num_valid", [None, 0, 5, 99])
def test_load_and_replicas(replicas, num_valid):
    """Each expert's rows are added to the counts before; token t goes to replica t mod the number of
    replicas. Padding is not counted.
    """
    generator = torch.Generator().manual_seed(6)
    logits, before = torch.randn(19, 24, generator=generator), torch.arange(24) * 10**10
    table = None if replicas is None else torch.stack([torch.randperm(40, generator=generator)[:24]] * replicas)
    if table is not None:
        table += torch.arange(replicas)[:, None] * 100
    valid = None if num_valid is None else torch.tensor([num_valid], dtype=torch.int32)
    loads, rule = [before.clone(), before.clone()], Routing(top_k=3, renormalize=True)
    found, expected = (
        route(logits, rule, load_E=load, log2phy_QE=table, num_valid=valid)
        for route, load in zip((gpu.route_and_count, routing.route_and_count), loads, strict=True)
    )
    assert found.ids_TK.tolist() == expected.ids_TK.tolist()
    assert found.physical_TK.tolist() == expected.physical_TK.tolist()
    assert loads[0].tolist() == loads[1].tolist()
    assert (loads[0] - before).sum() == 3 * min(19, 19 if num_valid is None else num_valid)
