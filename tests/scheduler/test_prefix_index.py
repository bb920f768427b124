import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from expertwire.scheduler.prefix_index import NOBODY, UNKNOWN, PrefixIndex


def array(*values):
    return np.array(values, np.int64)


def draw_names(seed, count):
    return np.random.default_rng(seed).integers(0, 2**64, (count, 2), np.uint64)


def insert(index, blocks, names, rank=0):
    return index.insert(array(*blocks), np.full(len(blocks), rank), names).tolist()


def find(index, owners, names):
    return index.find(array(*owners), array(*owners), names).tolist()


def test_names_that_differ_in_one_half_only_are_different():
    index = PrefixIndex(1, 8)
    (a, b) = draw_names(0, 2)
    mixed = np.array([a, [a[0], b[1]], [b[0], a[1]], b])
    assert insert(index, [3], mixed[:1]) == [True]
    assert find(index, [0] * 4, mixed) == [3, NOBODY, NOBODY, NOBODY]


def test_owners_have_names_of_their_own():
    index = PrefixIndex(3, 8)
    names = draw_names(0, 1)
    insert(index, [8 + 5], names)
    assert find(index, [0, 1, 2], names.repeat(3, axis=0)) == [NOBODY, 5, NOBODY]


def test_a_full_bucket_takes_no_more_until_something_leaves_it():
    index = PrefixIndex(1, 64)
    names = draw_names(0, 1).repeat(10, axis=0)  # equal names lie together
    assert insert(index, range(1, 11), names) == [True] * 8 + [False] * 2
    index.remove(array(4), array(0))
    assert insert(index, [9, 10], names[:2]) == [True, False]
    assert find(index, [0], names[:1])[0] in {1, 2, 3, 5, 6, 7, 8, 9}


def test_most_names_fit_when_every_block_has_one():
    index = PrefixIndex(8, 4096)
    fits = index.insert(np.arange(8 * 4096), np.arange(8).repeat(4096), draw_names(0, 8 * 4096))
    assert np.count_nonzero(~fits) < 8 * 4096 / 1000
    index.check_integrity(fits)


def test_the_guess_is_who_named_or_used_it_last():
    index = PrefixIndex(2, 8)
    names = draw_names(0, 1)
    assert index.guess(names).tolist() == [NOBODY]
    insert(index, [1], names, rank=0)
    insert(index, [9], names, rank=1)
    assert index.guess(names).tolist() == [1]
    find(index, [0], names)
    assert index.guess(names).tolist() == [0]
    index.remove(array(9), array(1))
    assert index.guess(names).tolist() == [0]
    index.remove(array(1), array(0))
    assert index.guess(names).tolist() == [UNKNOWN]


@settings(deadline=None, max_examples=50)
@given(st.randoms(use_true_random=True), st.integers(1, 3), st.integers(2, 12), st.integers(1, 20))
def test_it_does_what_a_dict_does(random, num_owners, num_blocks, num_names):
    index, names = PrefixIndex(num_owners, num_blocks), draw_names(1, num_names)
    names[::3, 0] = names[0, 0]  # some share a half, and so a place
    total, plain = num_owners * num_blocks, {}  # block -> number of its name
    for _ in range(100):
        some = random.sample(range(total), random.randint(0, min(total, 9)))
        new, old = [block for block in some if block not in plain], [block for block in some if block in plain]
        if random.random() < 0.6:
            numbers = random.choices(range(num_names), k=len(new))
            fits = insert(index, new, names[numbers])
            plain |= {block: number for block, number, fit in zip(new, numbers, fits, strict=True) if fit}
            assert all(fits) or len(plain) >= 8
        else:
            index.remove(array(*old), np.zeros(len(old), int))
            plain = {block: number for block, number in plain.items() if block not in old}
        index.check_integrity(np.isin(np.arange(total), list(plain)))
        for owner in range(num_owners):
            found = find(index, [owner] * num_names, names)
            held = [
                {block % num_blocks for block in plain if plain[block] == number and block // num_blocks == owner}
                for number in range(num_names)
            ]
            assert all(
                block in blocks or (block == NOBODY and not blocks) for block, blocks in zip(found, held, strict=True)
            )
