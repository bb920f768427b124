import numpy as np
import psutil
import pytest
from helpers.examples import examples
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

from expertwire.scheduler._compiled import blocks as block_loops
from expertwire.scheduler._compiled import prefixes as prefix_loops
from expertwire.scheduler._compiled.blocks import END, NONE
from expertwire.scheduler._compiled.prefixes import guess_prefix
from expertwire.scheduler.block_pool import BlockPool, aligned_rows

# Only compiled code can call these.
_find_block, _set_block_hash, _share_block = (
    prefix_loops.find_block,
    prefix_loops.set_block_hash,
    block_loops.share_block,
)
_weigh_block, _forget_block = block_loops.weigh_block, prefix_loops.forget_block


@njit
def find_block(blocks, owner, hash0, hash1):
    return _find_block(blocks, owner, hash0, hash1)


@njit
def set_block_hash(blocks, owner, number, hash0, hash1):
    _set_block_hash(blocks, owner, number, hash0, hash1)


@njit
def share_block(blocks, owner, number):
    _share_block(blocks, owner, number)


@njit
def weigh_block(blocks, owner, number):
    _weigh_block(blocks, owner, number)


@njit
def forget_block(blocks, owner, number):
    _forget_block(blocks, owner, number)


LETTERS = "abcdefghijklxyz"
HASHES = np.random.default_rng(0).integers(0, 2**64, (len(LETTERS), 2), np.uint64)


def array(*values):
    return np.array(values, np.int64)


def hashes(letters):
    return HASHES[[LETTERS.index(letter) for letter in letters]]


def find(pool, hash_B2, rank=0, cache=0):
    """Return a block of the rank with each hash, or `NONE`."""
    owner = cache * pool.num_ranks + rank
    numbers = [int(find_block(pool.blocks, owner, hash0, hash1)) for hash0, hash1 in hash_B2]
    return [number if number == NONE else number - owner * pool.num_blocks for number in numbers]


def found(pool, letter, cache=0):
    """Return each rank's block with that hash: rank -> block."""
    found_P = [find(pool, hashes(letter), rank, cache)[0] for rank in range(pool.num_ranks)]
    return {rank: block for rank, block in enumerate(found_P) if block != NONE}


def pool_of(num_blocks=6, num_caches=1, num_ranks=1):
    return BlockPool([num_blocks - 1] * num_caches, num_ranks)


def num_used(pool, cache):
    """Return the number of blocks with references on each rank."""
    return (pool.num_blocks_C[cache] - pool.num_free_CP[cache]).tolist()


def take(pool, count, rank=0, cache=0):
    return pool.allocate(cache, np.full(count, rank))


def set_hash(pool, ids, letters, rank=0, cache=0):
    set_hashes(pool, ids, hashes(letters), rank, cache)


def set_hashes(pool, ids, hash_B2, rank=0, cache=0):
    owner = cache * pool.num_ranks + rank
    for block, (hash0, hash1) in zip(ids, hash_B2, strict=True):
        set_block_hash(pool.blocks, owner, owner * pool.num_blocks + int(block), hash0, hash1)


def give(pool, ids, rank=0, cache=0):
    pool.free(cache, np.full(len(ids), rank), np.array(ids))
    pool.check_integrity()


def share(pool, ids, rank=0, cache=0):
    owner = cache * pool.num_ranks + rank
    for block in ids:
        share_block(pool.blocks, owner, owner * pool.num_blocks + int(block))
    pool.check_integrity()


def test_null_block_is_never_allocated():
    pool = pool_of(4, num_caches=2, num_ranks=2)
    ids = pool.allocate(1, array(0, 0, 0, 1, 1, 1))
    assert ids.tolist() == [1, 2, 3, 1, 2, 3]
    assert [num_used(pool, cache) for cache in (0, 1)] == [[0, 0], [3, 3]]
    pool.check_integrity()
    with pytest.raises(AssertionError, match="asked for"):
        take(pool, 1, rank=1, cache=1)


@pytest.mark.parametrize("together", [False, True])
def test_a_shared_block_is_free_when_all_have_freed_it(together):
    pool = pool_of()
    (block,) = take(pool, 1)
    share(pool, [block])
    share(pool, [block, block])
    assert num_used(pool, 0) == [1]
    for _ in range(3 - together):
        give(pool, [block])
        assert num_used(pool, 0) == [1]
    give(pool, [block] * (1 + together))
    assert num_used(pool, 0) == [0]
    with pytest.raises(AssertionError, match="too often"):
        give(pool, [block])


@pytest.mark.parametrize("block", [0, 2])
def test_freeing_what_is_not_in_use_is_an_error(block):
    with pytest.raises(AssertionError, match=r"null block|too often"):
        give(pool_of(), [block])


def test_shared_free_block_keeps_its_hash():
    pool = pool_of()
    ids = take(pool, 2)
    set_hash(pool, ids, "ab")
    give(pool, ids)
    assert found(pool, "a") == {0: ids[0]}
    share(pool, ids[:1])
    assert num_used(pool, 0) == [1]
    assert ids[0] not in take(pool, 4)
    assert found(pool, "a") == {0: ids[0]}
    assert found(pool, "b") == {}


def test_blocks_without_hash_are_allocated_first():
    pool = pool_of(5)
    ids = take(pool, 4)
    set_hash(pool, ids[:2], "ab")
    give(pool, ids)
    assert set(take(pool, 2)) == set(ids[2:])
    assert found(pool, "a")
    assert found(pool, "b")


def test_eviction_is_least_recently_used_first_and_tails_before_heads():
    pool = pool_of(7)
    first, second = take(pool, 3), take(pool, 3)
    set_hash(pool, first, "abc")
    set_hash(pool, second, "xyz")
    give(pool, second)
    give(pool, first)
    assert take(pool, 6).tolist() == [*second[::-1], *first[::-1]]


def test_reuse_moves_a_block_to_the_end_of_the_queue():
    pool = pool_of(4)
    ids = take(pool, 3)
    set_hash(pool, ids, "abc")
    give(pool, ids)  # to go: c, b, a
    share(pool, ids[2:])
    give(pool, ids[2:])
    assert [take(pool, 1)[0] for _ in ids] == [ids[1], ids[0], ids[2]]


def test_allocated_block_has_no_hash():
    pool = pool_of(3)
    ids = take(pool, 2)
    set_hash(pool, ids, "ab")
    give(pool, ids)
    take(pool, 1)
    assert [found(pool, letter) for letter in "ab"] == [{0: ids[0]}, {}]
    take(pool, 1)
    assert found(pool, "a") == {}
    pool.check_integrity()


def test_one_of_several_blocks_with_equal_hashes_is_found():
    pool = pool_of(3)
    ids = take(pool, 2)
    set_hash(pool, ids, "aa")
    assert found(pool, "a")[0] in ids
    give(pool, ids)
    for left in (1, 0):
        take(pool, 1)
        assert len(found(pool, "a")) == left


def test_hash_is_found_in_its_cache_and_rank():
    pool = pool_of(4, num_caches=2, num_ranks=2)
    ids = pool.allocate(1, array(0, 0, 1))
    set_hash(pool, ids[:2], "ab", cache=1)
    set_hash(pool, ids[2:], "b", rank=1, cache=1)
    assert find(pool, hashes("bac"), 0, 1) == [ids[1], ids[0], NONE]
    assert find(pool, hashes("bac"), 1, 1) == [ids[2], NONE, NONE]


def test_hashes_that_differ_in_one_half_are_different():
    pool = pool_of()
    (block,) = take(pool, 1)
    a, b = hashes("ab")
    mixed = np.array([a, [a[0], b[1]], [b[0], a[1]], b])
    set_hashes(pool, [block], mixed[:1])
    assert find(pool, mixed) == [block, NONE, NONE, NONE]


def test_caches_may_have_different_numbers_of_blocks():
    pool = BlockPool([5, 2], 2)
    assert pool.allocate(1, array(0, 0, 1)).tolist() == [1, 2, 1]
    assert pool.allocate(0, array(1, 1, 1, 1, 1)).tolist() == [1, 2, 3, 4, 5]
    assert [num_used(pool, cache) for cache in (0, 1)] == [[0, 5], [2, 1]]
    with pytest.raises(AssertionError, match="asked for"):
        take(pool, 1, rank=0, cache=1)
    pool.free(1, array(0), array(2))
    assert take(pool, 1, rank=0, cache=1).tolist() == [2]
    pool.check_integrity()


def pool_that_weighs(num_blocks, gains, followers, letters):
    """Return a pool whose first block is free without a hash, and then those of these worths, freed one after the other."""
    pool = BlockPool([num_blocks], 1, [True])
    ids = take(pool, num_blocks)
    set_hash(pool, ids[1:], letters)
    pool.blocks.worth_B["gain"][ids[1:]], pool.blocks.worth_B["followers"][ids[1:]] = gains, followers
    give(pool, ids[::-1])
    return pool


def test_weighed_blocks_are_evicted_by_worth_and_then_by_age():
    pool = pool_that_weighs(6, (10, 30, 20, 20, 40), (0, 1, 0, 2, 1), "abcde")
    # Without a hash, superseded ones, and then by the tokens that they save.
    assert take(pool, 6).tolist() == [1, 3, 6, 2, 4, 5]
    assert found(pool, "a") == {}


def test_weighed_blocks_age_by_what_is_evicted():
    pool = pool_that_weighs(4, (10, 30, 35), (0, 0, 0), "abc")
    assert take(pool, 3).tolist() == [1, 2, 3]  # of worth 30 in the end
    pool.blocks.worth_B["gain"][2], pool.blocks.worth_B["followers"][2] = 10, 0
    set_hash(pool, [2], "d")
    give(pool, [2])
    assert take(pool, 1).tolist() == [4], "40 is more than 35"


@examples(60)
@given(
    st.lists(st.tuples(st.sampled_from(["take", "share", "give", "weigh", "forget"]), st.integers(0, 11)), max_size=80)
)
def test_weighed_blocks_stay_in_order(actions):
    pool = pool_that_weighs(12, range(11), (np.arange(11) % 3).tolist(), LETTERS[:11])
    refs_B, number = pool.refs_CPB[0, 0], 0
    for action, block in actions:
        block += 1
        if action == "take" and pool.num_free_CP[0, 0]:
            free = [b for b in range(1, 13) if not refs_B[b]]
            least = min(free, key=lambda b: tuple(pool.blocks.worth_B[["rank", "freed"]][b]))
            assert take(pool, 1).tolist() == [least]
        elif action == "share":
            share_block(pool.blocks, 0, block)
        elif action == "give" and refs_B[block]:
            pool.blocks.worth_B["gain"][block] = number = number + 7
            give(pool, [block])
        elif action == "weigh":
            pool.blocks.worth_B["followers"][block] += 1
            weigh_block(pool.blocks, 0, block)
        elif action == "forget" and not refs_B[block]:
            forget_block(pool.blocks, 0, block)
        pool.check_integrity()


def test_guess_returns_a_rank_that_had_the_block():
    pool = pool_of(4, num_ranks=3)
    ids = pool.allocate(0, array(0, 2))
    set_hash(pool, ids[:1], "a")
    set_hash(pool, ids[1:], "b", rank=2)
    assert [guess_prefix(pool.blocks, hashes(letters), 0) for letters in ("b", "ba", "ab", "c", "")] == [
        (1, 2),
        (2, 0),
        (2, 2),
        (0, NONE),
        (0, NONE),
    ]
    assert guess_prefix(pool.blocks, hashes("cacc"), 1) == (2, 0), "up to the last one that any rank had"
    assert guess_prefix(pool.blocks, hashes("cacc"), 0) == (0, NONE), "unless too many before it are unknown"
    find(pool, hashes("b"))
    assert guess_prefix(pool.blocks, hashes("b"), 0) == (1, 2), "a rank that does not find it does not have it"
    pool.free(0, array(2), ids[1:])
    take(pool, 3, rank=2)
    assert guess_prefix(pool.blocks, hashes("b"), 0) == (1, 2), "it is a guess"


def test_guess_is_the_rank_that_used_the_hash_last():
    pool = pool_of(4, num_ranks=2)
    for rank in (0, 1):
        set_hash(pool, take(pool, 1, rank=rank), "a", rank=rank)
        assert guess_prefix(pool.blocks, hashes("a"), 0) == (1, rank)
    find(pool, hashes("a"))
    assert guess_prefix(pool.blocks, hashes("a"), 0) == (1, 0)
    give(pool, [1], rank=1)
    take(pool, 3, rank=1)
    assert guess_prefix(pool.blocks, hashes("a"), 0) == (1, 0), "what another loses does not matter"


def test_block_shared_and_freed_repeatedly_is_evicted_last():
    """Its old entries in the queue are invalid, however many there are."""
    pool = pool_of(4)
    set_hash(pool, take(pool, 3), "abc")
    give(pool, [1, 2, 3])
    for _ in range(50):
        share(pool, [2, 3])
        give(pool, [2, 3])
        pool.check_integrity()
    assert take(pool, 3).tolist() == [1, 3, 2]


def test_ranks_and_caches_have_separate_blocks_and_hashes():
    pool = pool_of(4, num_caches=2, num_ranks=3)
    ids = pool.allocate(0, array(0, 2, 2))
    set_hash(pool, ids[:1], "a")
    set_hash(pool, ids[2:], "a", rank=2)
    assert found(pool, "a") == {0: ids[0], 2: ids[2]}
    assert found(pool, "a", cache=1) == {}
    pool.free(0, array(2, 0), ids[[2, 0]])
    assert [num_used(pool, cache) for cache in (0, 1)] == [[0, 0, 1], [0, 0, 0]]
    take(pool, 3, rank=0)
    assert found(pool, "a") == {2: ids[2]}
    pool.check_integrity()


def corrupt_leak(pool):
    pool.num_free_CP[0, 0] -= 1


def corrupt_use_of_a_free_block(pool):
    pool.refs_CPB[0, 0, take(pool, 1) + 1] = 1


def corrupt_null(pool):
    pool.refs_CPB[0, 0, 0] = 1


def corrupt_chain(pool):
    pool.blocks.block_B["chain"][5] = END


def corrupt_hash(pool):
    pool.blocks.block_B["hash0"][1] += np.uint64(1)


def corrupt_queue(pool):
    pool.blocks.block_B["place"][4] = 0


@pytest.mark.parametrize(
    "corrupt",
    [corrupt_leak, corrupt_use_of_a_free_block, corrupt_null, corrupt_chain, corrupt_hash, corrupt_queue],
)
def test_the_integrity_check_finds(corrupt):
    pool = pool_of()
    set_hash(pool, take(pool, 2), "ab")
    pool.check_integrity()
    corrupt(pool)
    with pytest.raises(AssertionError):
        pool.check_integrity()


class PlainPool:
    """A plain model of one cache of one rank."""

    def __init__(self, num_blocks):
        self.free = list(range(1, num_blocks))  # the first goes first
        self.refs = dict.fromkeys(range(1, num_blocks), 0)
        self.hashed = {}  # of blocks

    def allocate(self):
        block = self.free.pop(0)
        self.refs[block] = 1
        self.hashed.pop(block, None)
        return block

    def share(self, block):
        if not self.refs[block]:
            self.free.remove(block)
        self.refs[block] += 1

    def drop(self, blocks):
        """Free in reverse order."""
        for block in reversed(blocks):
            self.refs[block] -= 1
            if not self.refs[block]:
                self.free.insert(len(self.free) if block in self.hashed else 0, block)


def pick(random, plains, times, most):
    """Pick up to `most` blocks of every rank, each up to `times(plain, block)` times, sorted by rank."""
    pairs = []
    for rank, plain in enumerate(plains):
        blocks = [block for block in plain.refs for _ in range(times(plain, block))]
        pairs += [(rank, block) for block in random.sample(blocks, min(len(blocks), random.randint(0, most)))]
    return pairs


def do_allocate(random, pool, cache, plains):
    counts = [min(len(plain.free), random.choice([0, 1, 1, 3])) for plain in plains]
    rank_B = np.repeat(np.arange(len(plains)), counts)
    pairs = zip(rank_B, pool.allocate(cache, rank_B), strict=True)
    assert sorted(pairs) == sorted((rank, plains[rank].allocate()) for rank in rank_B)


def do_share(random, pool, cache, plains):
    for rank, block in pick(random, plains, lambda plain, block: 2 * (block in plain.hashed), 2):
        share(pool, [block], rank, cache)
        plains[rank].share(block)


def do_free(random, pool, cache, plains):
    pairs = pick(random, plains, lambda plain, block: plain.refs[block], 6)
    pool.free(cache, array(*(rank for rank, _ in pairs)), array(*(block for _, block in pairs)))
    for rank, plain in enumerate(plains):
        plain.drop([block for owner, block in pairs if owner == rank])


def do_hash(random, pool, cache, plains):
    pairs = pick(random, plains, lambda plain, block: bool(plain.refs[block] and block not in plain.hashed), 9)
    for rank, block in pairs:
        letter = random.choice(LETTERS)
        set_hash(pool, [block], letter, rank, cache)
        plains[rank].hashed[block] = letter


def check(pool, cache, plains):
    pool.check_integrity()
    assert num_used(pool, cache) == [sum(map(bool, plain.refs.values())) for plain in plains]
    for rank, plain in enumerate(plains):
        ids = find(pool, HASHES, rank, cache)
        assert all(plain.hashed.get(block) == letter for block, letter in zip(ids, LETTERS, strict=True) if block >= 0)
        assert {letter for block, letter in zip(ids, LETTERS, strict=True) if block >= 0} == set(plain.hashed.values())


@examples(25)
@given(st.randoms(use_true_random=True), st.integers(1, 2), st.integers(1, 3), st.integers(2, 9))
def test_pool_agrees_with_a_plain_one(random, num_caches, num_ranks, num_blocks):
    pool = pool_of(num_blocks, num_caches, num_ranks)
    plains = [[PlainPool(num_blocks) for _ in range(num_ranks)] for _ in range(num_caches)]
    for _ in range(300):
        cache = random.randrange(num_caches)
        random.choice([do_allocate, do_share, do_free, do_hash])(random, pool, cache, plains[cache])
        check(pool, cache, plains[cache])


def test_rows_of_which_little_is_used_take_little_memory():
    process = psutil.Process()
    before = process.memory_info().rss
    rows = aligned_rows(512, 131_072, np.int32)
    assert rows.shape[1] * rows.itemsize % 128 == 64, "an odd number of cache lines"
    assert not rows[:, :64].any()
    rows[:, :64] = 1
    assert process.memory_info().rss - before < rows.nbytes / 8
