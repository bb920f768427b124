import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertwire.scheduler.block_pool import BlockPool


def ranks(*values):
    return np.array(values, np.int64)


def reserve_all(pool):
    num_ranks = pool.num_free_GP.shape[1]
    pool.reserve(np.arange(num_ranks), np.full(num_ranks, pool.capacity))


def test_the_null_block_is_never_handed_out():
    pool = BlockPool(num_groups=2, num_ranks=2, num_blocks=4)
    reserve_all(pool)
    ids = pool.allocate(1, ranks(0, 0, 0, 1, 1, 1))
    assert ids.tolist() == [1, 2, 3, 1, 2, 3]
    assert pool.num_used(0).tolist() == [0, 0]
    pool.check_integrity()
    with pytest.raises(AssertionError, match="asked for"):
        pool.allocate(1, ranks(1))


def test_a_block_with_two_references_is_freed_by_the_second():
    pool = BlockPool(num_groups=1, num_ranks=2, num_blocks=5)
    reserve_all(pool)
    ids = pool.allocate(0, ranks(0, 1))
    pool.refs_GPB[0, 1, ids[1]] += 1
    pool.free(0, ranks(0, 1), ids)
    assert pool.num_used(0).tolist() == [0, 1]
    pool.check_integrity()
    pool.free(0, ranks(1), ids[1:])
    assert pool.num_used(0).tolist() == [0, 0]
    pool.check_integrity()


def test_both_references_dropped_in_one_call():
    pool = BlockPool(num_groups=1, num_ranks=1, num_blocks=3)
    reserve_all(pool)
    (block,) = pool.allocate(0, ranks(0))
    pool.refs_GPB[0, 0, block] += 1
    pool.free(0, ranks(0, 0), np.array([block, block]))
    assert pool.num_used(0).tolist() == [0]
    pool.check_integrity()


@pytest.mark.parametrize("block", [0, 2])
def test_freeing_what_is_not_in_use_is_an_error(block):
    pool = BlockPool(num_groups=1, num_ranks=1, num_blocks=3)
    with pytest.raises(AssertionError, match=r"null block|too often"):
        pool.free(0, ranks(0), np.array([block]))


def test_reservations_are_promises_up_to_the_capacity():
    pool = BlockPool(num_groups=2, num_ranks=2, num_blocks=11)
    pool.reserve(ranks(1, 0, 1), np.array([3, 1, 4]))
    assert pool.unreserved_P().tolist() == [9, 3]
    pool.unreserve(ranks(1), np.array([4]))
    assert pool.unreserved_P().tolist() == [9, 7]
    with pytest.raises(AssertionError, match="promised"):
        pool.reserve(ranks(1), np.array([8]))


def corrupt_leak(pool):
    pool.num_free_GP[0, 0] -= 1


def corrupt_double(pool):
    pool.refs_GPB[0, 0, pool._free_GPB[0, 0, 0]] = 1


def corrupt_null(pool):
    pool.refs_GPB[0, 0, 0] = 1


def corrupt_promise(pool):
    pool.reserved_GP[0, 0] = 1


@pytest.mark.parametrize("corrupt", [corrupt_leak, corrupt_double, corrupt_null, corrupt_promise])
def test_the_integrity_check_finds(corrupt):
    pool = BlockPool(num_groups=1, num_ranks=1, num_blocks=6)
    reserve_all(pool)
    pool.allocate(0, ranks(0, 0))
    pool.check_integrity()
    corrupt(pool)
    with pytest.raises(AssertionError):
        pool.check_integrity()


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 2), max_size=8)), max_size=20))
def test_any_order_of_allocating_and_freeing(operations):
    pool = BlockPool(num_groups=1, num_ranks=3, num_blocks=7)
    reserve_all(pool)
    held = set()
    for take, wanted in operations:
        if take:
            counts = np.minimum(np.bincount(np.array(wanted, int), minlength=3), pool.num_free_GP[0])
            rank_B = np.repeat(np.arange(3), counts)
            new = set(zip(rank_B.tolist(), pool.allocate(0, rank_B).tolist(), strict=True))
            assert len(new) == len(rank_B)
            assert not new & held
            held |= new
        else:
            dropped = sorted(held)[: len(wanted)]
            held -= set(dropped)
            pool.free(0, np.array([r for r, _ in dropped], int), np.array([b for _, b in dropped], int))
        pool.check_integrity()
        assert pool.num_used(0).sum() == len(held)
