"""A request in the scheduler and its fixed-size record."""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from expertwire.scheduler.sampling_params import SAMPLING_DTYPE, SamplingParams

if TYPE_CHECKING:
    from expertwire.scheduler.tenants import Account

_I32 = np.dtype(np.int32)
_NO_IDS: frozenset[int] = frozenset()
NO_HASHES = np.zeros((0, 2), np.uint64)
_NO_TOKENS = np.zeros(0, np.int32)
# The record of a request, made when it is queued and read by the compiled loops, the running batch
# and the plan.
REQUEST_DTYPE = np.dtype(
    [
        ("key", np.int64),
        ("order", np.int64),
        ("priority", np.int64),
        ("num_tokens", np.int32),
        ("prompt_len", np.int32),
        ("limit", np.int32),
        ("stop_from", np.int32),  # stop and end-of-sequence ids count from this number of tokens on
        ("num_cached", np.int32),
        ("eos_stops", np.bool_),
        ("has_stop_ids", np.bool_),
        ("reads_cache", np.bool_),  # may start with cached blocks
        ("suspends", np.bool_),  # at `limit` it leaves its slot, and has not ended: see `Request.next_limit`
        ("has_pause_ids", np.bool_),
        ("sampling", SAMPLING_DTYPE),
    ]
)


def _format(dtype: np.dtype) -> str:
    """Return the `struct` format of a packed structured dtype."""
    codes = {"i8": "q", "i4": "i", "f4": "f", "b1": "?"}
    assert dtype.fields is not None
    return "".join(_format(kind) if kind.fields else codes[kind.str[1:]] for kind, *_ in dtype.fields.values())


_RECORD = struct.Struct("<" + _format(REQUEST_DTYPE))
assert _RECORD.size == REQUEST_DTYPE.itemsize


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """One output to generate. While it runs, its counters are in a row of the `RunningBatch`.

    Args:
        key: chosen by the caller, unique among the unfinished requests.
        prompt: i32 [prompt length], token ids.
        output: i32, output tokens that it begins with: of a branch that continues another one.
        params: an output with `n` branches is `n` requests; `params.seed` is not read here.
        branch: index among the `n` outputs.
        seed: draws are a function of (seed, branch, position).
        priority: lower is served earlier, by the policies that look at it.
        tenant: owner of the request; for fair shares and limits.
        salt: prefixes are shared only among requests of one tenant and salt.
        deadline: latest time of its first token, on the clock of `now`; None: no deadline.
        credit: output tokens that it may sample before `Scheduler.grant` adds to them; None: no limit.
        pause_ids: i32, ascending: token ids after which it is paused.
    """

    key: int
    prompt: np.ndarray
    params: SamplingParams
    branch: int = 0
    seed: int
    priority: int = 0
    tenant: str = ""
    salt: str = ""
    deadline: float | None = None
    credit: int | None = None
    output: np.ndarray = field(default_factory=lambda: _NO_TOKENS)
    pause_ids: np.ndarray = field(default_factory=lambda: _NO_TOKENS)
    arrival: float = 0.0  # the `now` of `Scheduler.submit`
    order: int = -1  # in the queue, by submission; set by the queue
    place: tuple[float, ...] = ()  # in the queue, before `order`; set by the policy
    limit: int = 0  # prompt and output tokens at most, set by `Scheduler.submit`
    credit_limit: int = sys.maxsize  # prompt and output tokens that its credit allows; likewise
    is_long: bool = False  # needs more tokens than the original context; likewise, and again where it outgrows that
    outgrows_at: int = sys.maxsize  # tokens with which one that is not long has outgrown it
    row: int = -1  # of the running batch; -1 while it waits
    num_cached: int = -1  # prompt tokens found in the cache when it was first admitted
    is_paused: bool = False
    paused_at: float = 0.0  # the `now` of the commit that paused it
    num_counted: int = 0  # tokens computed before it was preempted: their experts have been counted
    account: Account = field(init=False)  # of its tenant; set by `Scheduler.submit`
    stop_ids: frozenset[int] = field(init=False)
    tokens: np.ndarray = field(init=False)  # i32: the prompt, and the output so far of one that was preempted or forked
    # Of `tokens`, see `BlockHasher.hash`. Empty while it runs, because the running batch has them, and
    # without a prefix cache.
    block_hashes: np.ndarray = field(init=False)
    record: bytes = field(init=False, default=b"")  # REQUEST_DTYPE, while it waits

    def __post_init__(self) -> None:
        assert self.prompt.dtype == _I32, self.prompt.dtype
        assert self.prompt.ndim == 1, self.prompt.shape
        self.stop_ids = frozenset(self.params.stop_token_ids) if self.params.stop_token_ids else _NO_IDS
        self.tokens, self.block_hashes = self.prompt, NO_HASHES
        if len(self.output):
            self.tokens = np.concatenate((self.prompt, self.output))

    @property
    def suspends(self) -> bool:
        """Return whether it leaves its slot at `next_limit` and has not ended."""
        return self.next_limit < self.limit

    @property
    def next_limit(self) -> int:
        """Return the number of tokens at which it ends, has used up its credit or has outgrown the original context."""
        return min(self.limit, self.credit_limit, self.outgrows_at)

    @property
    def held(self) -> bool:
        """Return whether it has used up its credit or is paused, unless it runs."""
        return self.is_paused or len(self.tokens) >= self.credit_limit

    @property
    def has_run(self) -> bool:
        """Return whether it has run, unless it runs."""
        return self.num_cached >= 0

    def pauses_at(self, token: int) -> bool:
        """Return whether it is paused when it has sampled this token."""
        at = int(self.pause_ids.searchsorted(token))
        return at < len(self.pause_ids) and int(self.pause_ids[at]) == token

    def banned_ids(self, eos_token_ids: tuple[int, ...]) -> Sequence[int]:
        """Return the ids that cannot be sampled before `min_tokens` output tokens, ascending."""
        if not self.params.min_tokens:
            return ()
        return sorted(self.stop_ids.union(() if self.params.ignore_eos else eos_token_ids))

    def pack(self, vocab_size: int) -> bytes:
        """Return the `REQUEST_DTYPE` record. A value that an i32 cannot hold is replaced by one of equal effect."""
        p, prompt_len = self.params, len(self.prompt)
        min_tokens, next_limit = min(p.min_tokens, self.limit - prompt_len), self.next_limit
        return _RECORD.pack(
            self.key,
            self.order,
            self.priority,
            len(self.tokens),
            prompt_len,
            next_limit,
            prompt_len + min_tokens,
            self.num_cached,
            not p.ignore_eos,
            bool(self.stop_ids),
            p.prompt_logprobs is None,
            next_limit < self.limit,
            len(self.pause_ids) > 0,
            self.seed,
            self.branch,
            prompt_len,
            min_tokens,
            p.top_k if 0 < p.top_k < vocab_size else -1,
            self.num_counted if p.expert_load else -1,
            self.is_long,
            *p.rank_values(),
        )


def records(requests: Sequence[Request]) -> np.ndarray:
    """Return the records of waiting requests: `REQUEST_DTYPE` [A], a copy."""
    return np.frombuffer(bytearray().join([request.record for request in requests]), REQUEST_DTYPE)
