"""Names of prefixes: two requests whose tokens begin alike find each other's cache blocks by them.

A name is 128 bits: four lanes of multilinear hashing, h = floor((sum over i of m_i * s_i mod 2^64) / 2^32), with secret random
m_i (Lemire and Kaser, "Strongly universal string hashing is fast", 2014): for whoever does not know the secret, two different
prefixes have the same name with probability 2^-128. The characters s_i are the tokens, each with its position's own m_i, and the
digest of whom they belong to; so every prefix's sum is a running sum, computed for a whole prompt at once and continued token by
token for all running requests together.

Shape letters: L tokens, B blocks, R rows of the running table, A requests, s tokens in a block; 4 the lanes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from expertwire.scheduler import ragged

_SALT_WORDS = 8
_MAX_SALTS = 1024  # kept at hand


class PrefixNames:
    """Names the prefixes that fill whole blocks.

    Args:
        max_len: tokens of the longest request.
        block_size: s.
        secret: of this engine.
    """

    def __init__(self, max_len: int, block_size: int, secret: int) -> None:
        self.block_size = block_size
        num_blocks = -(-max_len // block_size)
        draw = np.random.Generator(np.random.PCG64(secret)).integers
        self._factors_B4s = draw(0, 2**64, (num_blocks, 4, block_size), np.uint64)
        self._salt_factors = draw(0, 2**64, (_SALT_WORDS + 1, 4), np.uint64)
        self._empty: dict[tuple[str, str], np.ndarray] = {}

    def empty(self, tenant: str, salt: str) -> np.ndarray:
        """The sum of the empty prefix of a tenant and salt: u64 [4]."""
        if (found := self._empty.get((tenant, salt))) is not None:
            return found
        if len(self._empty) == _MAX_SALTS:
            self._empty.clear()
        digest = hashlib.sha256(repr((tenant, salt)).encode()).digest()
        words = np.frombuffer(digest, np.uint32).astype(np.uint64)
        empty_4 = self._salt_factors[0] + (words[:, None] * self._salt_factors[1:]).sum(axis=0)
        self._empty[tenant, salt] = empty_4
        return empty_4

    def prefixes(self, tokens_A: Sequence[np.ndarray], empty_A4: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sums of the prefixes of each request's tokens, i32 [L], that fill 1, 2, ... blocks: one request behind the other,
        u64 [B, 4], and where each one's begin and end, [A + 1]."""
        size = self.block_size
        counts_A = np.array([len(tokens) // size for tokens in tokens_A])
        offsets_A1 = ragged.offsets(counts_A)
        tokens = np.concatenate([tokens[: len(tokens) // size * size] for tokens in tokens_A])
        sums_B4 = self._block_sums(ragged.positions(counts_A), tokens.reshape(-1, size)).cumsum(axis=0)
        before_A4 = np.concatenate((np.zeros((1, 4), np.uint64), sums_B4)).take(offsets_A1[:-1], axis=0)
        return sums_B4 + (empty_A4 - before_A4).repeat(counts_A, axis=0), offsets_A1

    def extended(self, sums_R4: np.ndarray, block_R: np.ndarray, tokens_Rs: np.ndarray) -> np.ndarray:
        """Each row's sum with one more block, number `block_R` of its sequence: u64 [R, 4]."""
        return sums_R4 + self._block_sums(block_R, tokens_Rs)

    def _block_sums(self, block_B: np.ndarray, tokens_Bs: np.ndarray) -> np.ndarray:
        # One more than the token: otherwise a prefix would have the name of its continuation by zeros.
        characters_Bs = tokens_Bs.astype(np.uint64) + np.uint64(1)
        return np.vecdot(characters_Bs[:, None], self._factors_B4s.take(block_B, axis=0))


def names(sums_B4: np.ndarray) -> np.ndarray:
    """The names for sums [B, 4]: u64 [B, 2]."""
    return (sums_B4 >> np.uint64(32)).astype(np.uint32).view(np.uint64)
