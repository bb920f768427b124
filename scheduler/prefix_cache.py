"""Names of prefixes: two requests whose tokens begin alike find each other's cache blocks by them.

A name is 128 bits: four lanes of multilinear hashing, h = floor((sum over i of m_i * s_i mod 2^64) / 2^32), with secret random
m_i (Lemire and Kaser, "Strongly universal string hashing is fast", 2014): for whoever does not know the secret, two different
prefixes have the same name with probability 2^-128. The characters s_i are the tokens, each with its position's own m_i, and the
digest of whom they belong to; so every prefix's sum is a running sum, computed at once for a prompt (`name`) and continued token
by token for all running requests together (`step_loops.take_in`).

Shape letters: W blocks, s tokens in a block; 4 the lanes.
"""

from __future__ import annotations

import hashlib

import numpy as np

from expertwire.scheduler._compiled import admissions

_U64 = np.dtype(np.uint64)
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
        self.factors_W4s = draw(0, 2**64, (num_blocks, 4, block_size), np.uint64)
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

    def name(self, tokens: np.ndarray, tenant: str, salt: str) -> np.ndarray:
        """The names of the prefixes of i32 tokens that fill 1, 2, ... blocks, and behind them the last one's sum, together u64
        [W + 2, 2]."""
        name_W2 = np.empty((len(tokens) // self.block_size + 2, 2), _U64)
        admissions.name_tokens(self.factors_W4s, tokens, self.empty(tenant, salt), name_W2)
        return name_W2
