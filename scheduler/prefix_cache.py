"""Block hashes, by which requests find cached blocks of prompts that begin alike.

The hash of a full block covers all tokens up to its end. It has 128 bits: four lanes of multilinear
hashing, h = floor((sum over i of m_i * s_i mod 2^64) / 2^32), with secret random m_i (Lemire and
Kaser, "Strongly universal string hashing is fast", 2014): without the secret, two different
prefixes collide with probability 2^-128. The characters s_i are the tokens, each position with its
own m_i, and a digest of tenant, salt and kind (whether the request is long). So hashes come from a
running sum, which is computed at once for a prompt and continued block by block for running requests
(`append_sampled` in `_compiled.steps`).

B blocks of a request, s tokens in a block; 4 the lanes.
"""

from __future__ import annotations

import hashlib

import numpy as np

from expertwire.scheduler._compiled import prefixes as prefix_loops

_SALT_WORDS = 8
_MAX_SALTS = 1024  # sums kept in memory


class BlockHasher:
    """Computes the hashes of full blocks.

    Args:
        max_len: tokens of the longest request.
        block_size: s.
        secret: of this engine.
    """

    def __init__(self, max_len: int, block_size: int, secret: int) -> None:
        self.block_size = block_size
        num_blocks = -(-max_len // block_size)
        draw = np.random.Generator(np.random.PCG64(secret)).integers
        self.factors_B4s = draw(0, 2**64, (num_blocks, 4, block_size), np.uint64)
        self._salt_factors = draw(0, 2**64, (_SALT_WORDS + 1, 4), np.uint64)
        self._empty: dict[tuple[str, str, bool], np.ndarray] = {}

    def empty(self, tenant: str, salt: str, is_long: bool = False) -> np.ndarray:
        """Return the running sum of the empty prefix of a tenant, salt and kind: u64 [4]."""
        owner = tenant, salt, is_long
        if (found := self._empty.get(owner)) is not None:
            return found
        if len(self._empty) == _MAX_SALTS:
            self._empty.clear()
        digest = hashlib.sha256(repr(owner).encode()).digest()
        words = np.frombuffer(digest, np.uint32).astype(np.uint64)
        empty_4 = self._salt_factors[0] + (words[:, None] * self._salt_factors[1:]).sum(axis=0)
        self._empty[owner] = empty_4
        return empty_4

    def hash(self, tokens: np.ndarray, tenant: str, salt: str, is_long: bool = False) -> np.ndarray:
        """Return the hashes of the full blocks of i32 tokens, followed by the last running sum: u64 [B + 2, 2].

        `is_long`: as in `Request`; equal tokens of a long and of a short request have other hashes.
        """
        hash_B2 = np.empty((len(tokens) // self.block_size + 2, 2), np.uint64)
        prefix_loops.hash_blocks(self.factors_B4s, tokens, self.empty(tenant, salt, is_long), hash_B2)
        return hash_B2
