"""Choice of experts: ids, order and weights."""

import pytest
import torch

from expertwire.kernels import registry
from expertwire.kernels.ops.variants import Routing

OPS = {"cpu": registry.choose("cpu"), "torch": registry.plain()}


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(0, 8, 2), (1, 8, 2), (50, 128, 8), (7, 5, 5), (3, 1, 1)])
def test_route(ops, dtype, renormalize, tokens, experts, top_k):
    logits = (3 * torch.randn(tokens, experts, generator=torch.Generator().manual_seed(2))).to(dtype)
    ids, weights = ops.route(logits, Routing(top_k=top_k, renormalize=renormalize))
    assert (ids.dtype, weights.dtype) == (torch.int64, torch.float32)
    assert ids.shape == weights.shape == (tokens, top_k)
    probs = logits.double().softmax(-1)
    kept = probs.gather(1, ids)
    best = probs.topk(top_k).values
    torch.testing.assert_close(kept, best, rtol=1e-6, atol=0)  # bf16 logits have ties, which any may win
    assert all(len(set(row)) == top_k for row in ids.tolist())
    expected = best / best.sum(-1, keepdim=True) if renormalize else best
    torch.testing.assert_close(weights.double(), expected, rtol=2e-6, atol=1e-9)


def test_of_equal_weights_the_lower_id_comes_first():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 2.0], [0.0] * 5])
    ids, _ = OPS["cpu"].route(logits, Routing(top_k=3, renormalize=True))
    assert ids.tolist() == [[1, 2, 3], [0, 1, 2]]


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_extreme_logits(ops):
    logits = torch.tensor([[1e4, -1e4, 0.0, 9999.0]])
    ids, weights = ops.route(logits, Routing(top_k=2, renormalize=True))
    assert ids.tolist() == [[0, 3]]
    torch.testing.assert_close(weights, torch.tensor([[1.0, 1.0]]).mul(torch.tensor([0.7310586, 0.2689414])))


def test_a_tokens_bits_do_not_depend_on_its_neighbours():
    logits = torch.randn(60, 40, generator=torch.Generator().manual_seed(5))
    ids, weights = OPS["cpu"].route(logits, Routing(top_k=4, renormalize=True))
    for t in range(60):
        alone = OPS["cpu"].route(logits[t : t + 1], Routing(top_k=4, renormalize=True))
        assert torch.equal(alone[0][0], ids[t])
        assert torch.equal(alone[1][0], weights[t])
