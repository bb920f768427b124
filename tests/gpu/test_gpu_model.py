"""The engine on a GPU: its tokens beside the CPU's, its graphs beside none, requests alone and in company."""

import pytest

pytest.importorskip("triton")

from expertwire.bench.first_contact import one_rank_checks

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("check", ["like_the_cpu", "graphs_change_nothing", "company_changes_nothing"])
def test_demo_model(check, dtype):
    assert getattr(one_rank_checks, check)("cuda", dtype)
