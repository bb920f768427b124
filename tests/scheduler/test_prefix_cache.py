import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertwire.scheduler.prefix_cache import BlockHasher

BLOCK = 4
MAX_LEN = 64
HASHER = BlockHasher(MAX_LEN, BLOCK, secret=1)
tokens = st.lists(st.integers(0, 2**31 - 1), max_size=MAX_LEN)


def hash_all(values, tenant="", salt="", hasher=HASHER):
    """Return the 16-byte hashes of the full blocks."""
    hash_B2 = hasher.hash(np.array(values, np.int32), tenant, salt)[:-2]
    assert hash_B2.nbytes == 16 * (len(values) // hasher.block_size)
    return [each.tobytes() for each in hash_B2]


@given(tokens)
def test_hash_follows_the_formula(values):
    """Hashes are upper halves of sums, and a block's sum continues that of the block before."""
    *hash_B2, sum_low_2, sum_high_2 = HASHER.hash(np.array(values, np.int32), "a", "b")
    total = HASHER.empty("a", "b").tolist()
    for block in range(len(values) // BLOCK):
        for lane in range(4):
            factors = HASHER.factors_B4s[block, lane].tolist()
            characters = values[block * BLOCK : (block + 1) * BLOCK]
            total[lane] += sum(m * (s + 1) for m, s in zip(factors, characters, strict=True))
        halves = np.array([lane % 2**64 >> 32 for lane in total], np.uint32)
        assert hash_B2[block].tobytes() == halves.tobytes()
    assert [*sum_low_2, *sum_high_2] == [lane % 2**64 for lane in total]


@given(tokens, tokens, tokens)
def test_blocks_have_equal_hashes_as_far_as_the_tokens_are_equal(common, left, right):
    left, right = (common + left)[:MAX_LEN], (common + right)[:MAX_LEN]
    same = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    found = [a == b for a, b in zip(hash_all(left), hash_all(right), strict=False)]
    assert found == [(block + 1) * BLOCK <= same for block in range(len(found))]


@given(tokens.filter(len), st.integers(0, MAX_LEN - 1), st.integers(0, 31))
def test_every_token_bit_changes_the_hashes_from_its_block_on(values, at, bit):
    at %= len(values)
    changed = [token ^ (1 << bit) if i == at and bit < 31 else token for i, token in enumerate(values)]
    found = [a == b for a, b in zip(hash_all(values), hash_all(changed), strict=True)]
    assert found == [changed == values or block < at // BLOCK for block in range(len(found))]


@given(tokens.filter(lambda values: len(values) >= BLOCK))
def test_order_of_tokens_changes_the_hash(values):
    turned = values[1:BLOCK] + values[:1]
    assert (hash_all(values)[0] == hash_all(turned)[0]) == (values[:BLOCK] == turned)


@pytest.mark.parametrize("token", [0, 1, 2**31 - 1])
def test_repeated_token_gives_distinct_hashes(token):
    found = hash_all([token] * MAX_LEN)
    assert len(set(found)) == len(found) == MAX_LEN // BLOCK


def test_partial_block_has_no_hash():
    assert hash_all([5] * (BLOCK - 1)) == []
    assert hash_all([5] * (2 * BLOCK - 1)) == hash_all([5] * BLOCK)


def test_tenant_salt_and_secret_change_the_hash():
    values = range(MAX_LEN)
    other = BlockHasher(MAX_LEN, BLOCK, secret=2)
    owners = [("", ""), ("a", ""), ("", "a"), ("a", "b"), ("b", "a"), ("ab", ""), ("a', 'b", ""), ("a", "', 'b")]
    found = [hash_all(values, *owner) for owner in owners] + [hash_all(values, *owners[0], other)]
    for block in range(MAX_LEN // BLOCK):
        assert len({hashes[block] for hashes in found}) == len(found)


def test_equal_secrets_give_equal_hashes():
    assert hash_all(range(MAX_LEN), "a", "b") == hash_all(
        range(MAX_LEN), "a", "b", BlockHasher(MAX_LEN, BLOCK, secret=1)
    )


def test_many_prefixes_collide_in_neither_half():
    # 20,000 hashes of 64 bits each: any two would be equal by chance once in 10^11 runs.
    rng = np.random.default_rng(0)
    blocks = np.concatenate((rng.integers(0, 3, (10_000, BLOCK)), rng.integers(0, 2**31, (10_000, BLOCK))))
    values = np.unique(blocks, axis=0).astype(np.int32)
    found = [hash_all(row)[0] for row in values]
    for half in (slice(0, 8), slice(8, 16)):
        assert len({each[half] for each in found}) == len(values)
