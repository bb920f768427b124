"""The rules of routing, against transformers' routers; ties, which those leave open, by hand."""

from types import SimpleNamespace

import pytest
import torch

from expertwire.kernels.ops import combine, routing
from expertwire.kernels.ops.variants import ExpertGroups, Routing

EXPERTS, TOP_K = 64, 6
GROUPS = {"n_group": 8, "topk_group": 3}


def config(**more):
    return SimpleNamespace(
        num_experts_per_tok=TOP_K,
        num_experts=EXPERTS,
        num_local_experts=EXPERTS,
        hidden_size=EXPERTS,
        norm_topk_prob=True,
        **more,
    )


def peer(name):
    """transformers' router of an identity, so that it routes by the logits that it is given; and our arguments for its rule."""
    bias = None
    if name == "deepseek v2":
        from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

        router = DeepseekV2TopkRouter(config(routed_scaling_factor=16.0, topk_method="group_limited_greedy", **GROUPS))
        rule = {"renormalize": False, "scale": 16.0, "groups": ExpertGroups(number=8, kept=3, by="best")}
    elif name == "deepseek v3":
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

        router = DeepseekV3TopkRouter(config(routed_scaling_factor=2.5, **GROUPS))
        router.e_score_correction_bias.copy_(torch.randn(EXPERTS, generator=torch.Generator().manual_seed(1)))
        groups = ExpertGroups(number=8, kept=3, by="two_best")
        bias = router.e_score_correction_bias
        rule = {"renormalize": True, "score": "sigmoid", "scale": 2.5, "groups": groups}
    else:
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

        router, rule = GptOssTopKRouter(config()), {"renormalize": True}
    with torch.no_grad():
        router.weight.copy_(torch.eye(EXPERTS))
    return router, Routing(top_k=TOP_K, **rule), bias


@pytest.mark.parametrize("name", ["deepseek v2", "deepseek v3", "gpt-oss"])
def test_experts_and_weights_are_those_of_transformers(name):
    router, *rule = peer(name)
    logits = 2 * torch.randn(50, EXPERTS, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, expected_weights, expected_ids = router(logits)
    ids, weights = routing.reference(logits, *rule)
    ours, theirs = (
        torch.zeros(50, EXPERTS).scatter(1, *pair) for pair in ((ids, weights), (expected_ids, expected_weights))
    )
    torch.testing.assert_close(ours, theirs)


def test_sqrt_softplus_and_top_1():
    logits = torch.tensor([[-1.0, 30.0, 31.0, 2.0]])
    ids, weights = routing.reference(logits, Routing(top_k=2, renormalize=False, score="sqrt_softplus", scale=2.0))
    assert ids.tolist() == [[2, 1]]
    torch.testing.assert_close(weights, 2 * torch.tensor([[31.0, 30.0]]).exp().log1p().sqrt())
    # The sigmoids of both are 1: the larger logit wins nevertheless.
    ids, weights = routing.reference(logits, Routing(top_k=1, renormalize=False, score="sigmoid"))
    assert (ids.tolist(), weights.tolist()) == ([[2]], [[1.0]])


@pytest.mark.parametrize("by", ["best", "two_best"])
def test_of_equal_groups_and_experts_the_lowest_id_wins(by):
    logits = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0]])
    rule = Routing(top_k=3, renormalize=True, groups=ExpertGroups(number=4, kept=2, by=by))
    ids, _ = routing.reference(logits, rule)
    assert ids.tolist() == [[1, 2, 0]]


def test_scores_that_are_all_zero_make_finite_weights():
    _, weights = routing.reference(torch.full((1, 4), -200.0), Routing(top_k=2, renormalize=True, score="sigmoid"))
    assert weights.tolist() == [[0.0, 0.0]]


def test_the_shared_expert_is_added_to_the_rounded_sum():
    rows = torch.tensor([[[1.0], [2.0**-8]]]).bfloat16()
    # Unrounded, the three would make up the next bf16 number above 1; of two, rounding leaves 1, again and again.
    assert combine.reference(rows, torch.ones(1, 2), torch.tensor([[2.0**-8]]).bfloat16()).tolist() == [[1.0]]
    assert combine.reference(rows, torch.ones(1, 2), torch.tensor([[2.0**-7]]).bfloat16()).tolist() == [[1.0078125]]
