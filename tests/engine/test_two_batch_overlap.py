"""A step in two halves: all of its tokens, each once, and the bits of the whole step, whatever model, ranks and company."""

from types import SimpleNamespace

import numpy as np
import pytest
import test_rebalance_live as live
from helpers import architectures, parity
from helpers import tiny_checkpoints as tiny
from helpers.examples import examples
from helpers.rank_model import RankModel
from hypothesis import given
from hypothesis import strategies as st

from expertwire import LLM
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.runner.micro_batch import MicroBatch, micro_batches, split_tokens

# One for each kind of attention and of mixture.
KINDS = ("mixtral", "deepseek_v2", "deepseek_v32", "gpt_oss", "llama4_scout")


def rank_plan(sequences):
    """Return the plan of (first position, number of tokens, whether it samples) for slots 0, 1, ..."""
    start, num, sampled = (np.array(values, np.int32) for values in zip(*sequences, strict=True))
    slots = np.arange(len(sequences), dtype=np.int32)
    return SimpleNamespace(
        sched_slot_S=slots, sched_start_S=start, sched_num_S=num, sched_sample_S=sampled.astype(np.uint8)
    )


def of_slots(step):
    """Positions by slot, in the order of rows."""
    return {slot: step.position_T[step.slot_T == slot].tolist() for slot in sorted(set(step.slot_T.tolist()))}


@examples(100)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9), st.booleans()), min_size=1, max_size=8),
    st.integers(1, 3),
)
def test_parts_have_each_token_once_and_in_order(sequences, num_micro_batches):
    plan = rank_plan(sequences)
    [whole], parts = micro_batches(plan), micro_batches(plan, num_micro_batches)
    for part, [num] in zip(parts, split_tokens([len(whole.slot_T)], num_micro_batches), strict=True):
        nums = np.diff(part.cu_seqlens_q)
        assert nums.sum() == len(part.slot_T) == num
        assert (nums > 0).all()
        assert (nums[: part.num_decodes] == 1).all(), "sequences with one query come first"
        ends = part.cu_seqlens_q[1:]
        assert (part.position_T[ends - 1] == part.seq_len_S - 1).all()
    joined = MicroBatch.joined(parts)
    assert of_slots(joined) == of_slots(whole), "a part sees what earlier ones have computed"
    assert sorted(joined.slot_O.tolist()) == sorted(whole.slot_O.tolist())
    rows = joined.last_row_S[joined.is_sampled_S]
    assert (joined.slot_T[rows] == joined.slot_O).all()
    last = {slot: positions[-1] for slot, positions in of_slots(whole).items()}
    assert joined.position_T[rows].tolist() == [last[slot] for slot in joined.slot_O.tolist()]
    assert (np.diff(joined.cu_seqlens_q) > 0).all()


@pytest.mark.parametrize(
    "name",
    [name if name in KINDS else pytest.param(name, marks=pytest.mark.full) for name in architectures.all_of_them()],
)
def test_every_architecture(name):
    """Also where sequences are cut in the middle of a window or a chunk, and with shared experts, index and latents."""
    folder = architectures.folder(name)
    whole, halves = RankModel(folder), RankModel(folder, num_micro_batches=2)
    for length in (2, 75):
        ids = tiny.prompt(length, seed=length)
        assert np.array_equal(halves.logits(ids), whole.logits(ids)), f"{length} tokens"
        assert np.array_equal(halves.logits(ids, 7), whole.logits(ids)), f"{length} tokens, 7 at a time"


@pytest.fixture(scope="module")
def alone():
    return live.serve(ep_size=1)[0]


@pytest.mark.parametrize(
    "options",
    [
        {"ep_size": 2, "all2all_backend": "nvlink", "max_num_batched_tokens": 33},
        pytest.param(
            {"ep_size": 4, "all2all_backend": "reference", "num_redundant_experts": 4, "eplb_step_interval": 4},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["nvlink, small steps", "reference, while experts move"],
)
def test_served_requests_have_the_same_bits(alone, options):
    """Prompts and decodes together; at the end there are steps of one token, so halves and ranks without any."""
    seen, stats = live.serve(enable_two_batch_overlap=True, **options)
    assert seen == alone
    rows = np.array(stats["expert_load"])
    assert set(rows.sum(axis=1).tolist()) == {0, live.TOP_K * stats["tokens_computed"]}


@pytest.mark.full
@pytest.mark.parametrize("all_to_all", ["reference", "nccl", "nvlink"])
@pytest.mark.parametrize("ep_size", [2, 4])
def test_all_backends(alone, all_to_all, ep_size):
    for max_num_batched_tokens in (1, 50):
        options = {"ep_size": ep_size, "all2all_backend": all_to_all, "max_num_batched_tokens": max_num_batched_tokens}
        assert live.serve(enable_two_batch_overlap=True, **options)[0] == alone


def test_where_nothing_travels_it_is_refused():
    with pytest.raises(
        ValueError, match="enable_two_batch_overlap True has no effect with ep_size 1, which exchanges no tokens"
    ):
        EngineConfig(model="x", enable_two_batch_overlap=True)
    with pytest.raises(ValueError, match="enable_two_batch_overlap must be True or False, got 1"):
        EngineConfig(model="x", ep_size=2, enable_two_batch_overlap=1)
    with pytest.raises(ValueError, match="enable_two_batch_overlap has no effect: Qwen3ForCausalLM has no experts"):
        LLM(parity.checkpoint("qwen3"), ep_size=2, enable_two_batch_overlap=True, launcher="local")
