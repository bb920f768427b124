import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertwire.scheduler.prefix_cache import PrefixNames

BLOCK = 4
MAX_LEN = 64
PREFIXES = PrefixNames(MAX_LEN, BLOCK, secret=1)
tokens = st.lists(st.integers(0, 2**31 - 1), max_size=MAX_LEN)


def name_all(values, tenant="", salt="", prefixes=PREFIXES):
    """One name of 16 bytes for every prefix that fills whole blocks."""
    names_W2 = prefixes.name(np.array(values, np.int32), tenant, salt)[:-2]
    assert names_W2.nbytes == 16 * (len(values) // prefixes.block_size)
    return [name.tobytes() for name in names_W2]


@given(tokens)
def test_a_name_is_that_of_the_formula(values):
    """The names are halves of sums, and a sum goes on from that of the prefix."""
    *names_W2, sum_low_2, sum_high_2 = PREFIXES.name(np.array(values, np.int32), "a", "b")
    total = PREFIXES.empty("a", "b").tolist()
    for block in range(len(values) // BLOCK):
        for lane in range(4):
            factors = PREFIXES.factors_W4s[block, lane].tolist()
            characters = values[block * BLOCK : (block + 1) * BLOCK]
            total[lane] += sum(m * (s + 1) for m, s in zip(factors, characters, strict=True))
        halves = np.array([lane % 2**64 >> 32 for lane in total], np.uint32)
        assert names_W2[block].tobytes() == halves.tobytes()
    assert [*sum_low_2, *sum_high_2] == [lane % 2**64 for lane in total]


@given(tokens, tokens, tokens)
def test_whole_blocks_have_the_same_names_as_far_as_the_tokens_are_the_same(common, left, right):
    left, right = (common + left)[:MAX_LEN], (common + right)[:MAX_LEN]
    same = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    found = [a == b for a, b in zip(name_all(left), name_all(right), strict=False)]
    assert found == [(block + 1) * BLOCK <= same for block in range(len(found))]


@given(tokens.filter(len), st.integers(0, MAX_LEN - 1), st.integers(0, 31))
def test_any_bit_of_any_token_counts_from_its_block_on(values, at, bit):
    at %= len(values)
    changed = [token ^ (1 << bit) if i == at and bit < 31 else token for i, token in enumerate(values)]
    found = [a == b for a, b in zip(name_all(values), name_all(changed), strict=True)]
    assert found == [changed == values or block < at // BLOCK for block in range(len(found))]


@given(tokens.filter(lambda values: len(values) >= BLOCK))
def test_the_same_tokens_in_another_order_have_another_name(values):
    turned = values[1:BLOCK] + values[:1]
    assert (name_all(values)[0] == name_all(turned)[0]) == (values[:BLOCK] == turned)


@pytest.mark.parametrize("token", [0, 1, 2**31 - 1])
def test_prefixes_of_one_token_over_and_over_differ_by_their_length(token):
    found = name_all([token] * MAX_LEN)
    assert len(set(found)) == len(found) == MAX_LEN // BLOCK


def test_a_beginning_that_does_not_fill_a_block_has_no_name():
    assert name_all([5] * (BLOCK - 1)) == []
    assert name_all([5] * (2 * BLOCK - 1)) == name_all([5] * BLOCK)


def test_tenant_salt_and_secret_are_part_of_the_name():
    values = range(MAX_LEN)
    other = PrefixNames(MAX_LEN, BLOCK, secret=2)
    owners = [("", ""), ("a", ""), ("", "a"), ("a", "b"), ("b", "a"), ("ab", ""), ("a', 'b", ""), ("a", "', 'b")]
    found = [name_all(values, *owner) for owner in owners] + [name_all(values, *owners[0], other)]
    for block in range(MAX_LEN // BLOCK):
        assert len({names_B[block] for names_B in found}) == len(found)


def test_another_engine_with_the_same_secret_gives_the_same_names():
    assert name_all(range(MAX_LEN), "a", "b") == name_all(
        range(MAX_LEN), "a", "b", PrefixNames(MAX_LEN, BLOCK, secret=1)
    )


def test_no_two_of_many_prefixes_share_even_half_a_name():
    # 20,000 names of 64 bits each: any two would be alike by chance once in 10^11 runs.
    rng = np.random.default_rng(0)
    blocks = np.concatenate((rng.integers(0, 3, (10_000, BLOCK)), rng.integers(0, 2**31, (10_000, BLOCK))))
    values = np.unique(blocks, axis=0).astype(np.int32)
    found = [name_all(row)[0] for row in values]
    for half in (slice(0, 8), slice(8, 16)):
        assert len({name[half] for name in found}) == len(values)
