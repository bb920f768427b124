"""The whole matrix against transformers: families, ranks, chunking, batching, replicas, launchers."""

import pytest
from helpers import parity

from expertwire import LLM

pytestmark = pytest.mark.full

OPTIONS = {"dtype": "float32", "threads_per_rank": 1, "kv_cache_memory_bytes": 20_000_000}


def check(variant, **options):
    """Every prompt alone, then all together. Chunks are of interest where a prompt does not fit into one."""
    chunk = options.get("max_num_batched_tokens", 0)
    cases = [parity.case(variant, length) for length in parity.LENGTHS]
    with LLM(parity.checkpoint(variant), **OPTIONS, **options) as llm:
        alone = parity.compare(llm, [case for case in cases if len(case.ids) > chunk], together=False)
        together = parity.compare(llm, cases, together=True)
    for name, tally in (("alone", alone), ("together", together)):
        print(
            f"{variant}, {options}, {name}: {tally.tokens} tokens ({tally.excused} excused), "
            f"{tally.positions} positions, largest difference {tally.largest:.1e}"
        )
        assert not tally.failures
        assert tally.excused <= 0.01 * tally.tokens


@pytest.mark.parametrize("ep_size", [1, 2, 3, 4])
@pytest.mark.parametrize("chunk", [None, 32], ids=["whole", "chunked"])
@pytest.mark.parametrize("variant", parity.VARIANTS)
def test_local(variant, chunk, ep_size):
    check(variant, launcher="local", ep_size=ep_size, **({} if chunk is None else {"max_num_batched_tokens": chunk}))


@pytest.mark.parametrize(
    ("variant", "ep_size", "redundant"), [("mixtral", 2, 8), ("qwen3_moe", 3, 2), ("mixtral, 2 experts", 4, 5)]
)
def test_redundant_experts(variant, ep_size, redundant):
    check(variant, launcher="local", ep_size=ep_size, num_redundant_experts=redundant)


@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe", "qwen3"])
def test_ray(variant):
    check(variant, launcher="ray", ep_size=2)
