"""The CPU's rules of routing against the reference: choices, weights, ties, and bits that depend on a token alone."""

import pytest
import torch

from expertwire.kernels import registry
from expertwire.kernels.ops import routing
from expertwire.kernels.ops.variants import ExpertGroups, Routing

OPS = registry.cpu()
GROUPS = {
    "all": None,
    "best": ExpertGroups(number=8, kept=3, by="best"),
    "two best": ExpertGroups(number=8, kept=3, by="two_best"),
    "one": ExpertGroups(number=8, kept=1, by="two_best"),
}
EXPERTS, TOP_K = 64, 6
BIAS = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(1))


def logits(num_tokens, dtype=torch.float32):
    return (3 * torch.randn(num_tokens, EXPERTS, generator=torch.Generator().manual_seed(0))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("biased", [False, True])
def test_reference(score, biased, groups, dtype):
    for renormalize in (False, True):
        rule = Routing(top_k=TOP_K, renormalize=renormalize, score=score, groups=groups, scale=2.5)
        arguments = logits(50, dtype), rule, BIAS if biased else None
        ids, weights = OPS.route(*arguments)
        expected_ids, expected = routing.reference(*arguments)
        if dtype == torch.float32:  # bf16 logits have ties, and sums with a bias are rounded
            assert torch.equal(ids, expected_ids)
        torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-7)


def test_of_equal_experts_and_groups_the_first_wins():
    groups = ExpertGroups(number=4, kept=2, by="two_best")
    rule = Routing(top_k=3, renormalize=False, score="sigmoid", groups=groups)
    ids, weights = OPS.route(torch.zeros(1, 8), rule, torch.zeros(8))
    assert (ids.tolist(), weights.tolist()) == ([[0, 1, 2]], [[0.5, 0.5, 0.5]])


def test_distinct_logits_stay_distinct_where_their_probabilities_do_not():
    values = torch.tensor([[200.0, -3.0, 50.0, 20.0]])
    rule = Routing(top_k=3, renormalize=True)
    ids, weights = OPS.route(values, rule)
    assert torch.equal(ids, routing.reference(values, rule)[0])
    assert ids.tolist() == [[0, 2, 3]]
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.0, 0.0]]))


def test_extremes_stay_finite():
    values = torch.tensor([[-1e4, 1e4, 30.0, -90.0]])
    ids, weights = OPS.route(values, Routing(top_k=4, renormalize=False, score="sigmoid"))
    assert ids.tolist() == [[1, 2, 3, 0]]
    torch.testing.assert_close(weights, values.sigmoid().gather(1, ids), rtol=1e-5, atol=1e-37)
    ids, weights = OPS.route(values, Routing(top_k=4, renormalize=True, score="sqrt_softplus"))
    assert ids.tolist() == [[1, 2, 3, 0]]
    assert weights.isfinite().all()


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_a_tokens_bits_do_not_depend_on_its_neighbours(score):
    rule = Routing(top_k=TOP_K, renormalize=True, score=score, groups=GROUPS["two best"], scale=2.5)
    ids, weights = OPS.route(logits(61), rule, BIAS)
    for size in (1, 7):
        parts = [OPS.route(part, rule, BIAS) for part in logits(61).split(size)]
        assert torch.equal(torch.cat([part[0] for part in parts]), ids)
        assert torch.equal(torch.cat([part[1] for part in parts]), weights)
