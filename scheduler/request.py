"""A request as the scheduler sees it, and the fixed-size record of its sampling parameters that a rank gets."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from expertwire.scheduler import ragged
from expertwire.scheduler.plan import SAMPLING_DTYPE
from expertwire.scheduler.sampling_params import SamplingParams

_I32 = np.dtype(np.int32)
_NO_IDS: frozenset[int] = frozenset()
_FLOAT_MAX = float(np.finfo(np.float32).max)
# What the running table, those who admit and the ranks want to know of a request.
FACTS = np.dtype(
    [
        ("key", np.int64),
        ("order", np.int64),
        ("priority", np.int64),
        ("num_tokens", np.int32),
        ("prompt_len", np.int32),
        ("limit", np.int32),
        ("stop_from", np.int32),  # stop and end-of-sequence ids count from so many tokens on
        ("num_cached", np.int32),
        ("eos_stops", np.bool_),
        ("has_stop_ids", np.bool_),
        ("may_begin_cached", np.bool_),
        ("reserved", np.bool_),
        ("sampling", SAMPLING_DTYPE),
    ]
)
_SAMPLING = "".join({"i8": "q", "i4": "i", "f4": "f"}[kind[1:]] for _, kind in SAMPLING_DTYPE.descr)
_FACTS = struct.Struct("<3q5i4?" + _SAMPLING)


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """One generation asked for. While it runs, its counters are in a row of the `RunningTable`.

    Args:
        key: chosen by the caller, unique among the unfinished requests.
        prompt: i32 [prompt length], token ids.
        params: an output with `n` branches is `n` requests; `params.seed` is not read here.
        branch: which of the `n` outputs this is.
        seed: draws are a function of (seed, branch, position).
        priority: lower is served earlier, by the policies that look at it.
        tenant: whose it is; for fair shares and limits.
        salt: prefixes are shared only among requests of one tenant and salt.
        deadline: when its first token is wanted, on the clock of `now`; None: whenever it comes.
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
    arrival: float = 0.0  # the `now` of `Scheduler.submit`
    order: int = -1  # in the queue, by submission; set by the queue
    place: tuple[float, ...] = ()  # in the queue, before `order`; set by the policy
    limit: int = 0  # prompt and output tokens at most, set by `Scheduler.submit`
    row: int = -1  # of the running table; -1 while it waits
    num_cached: int = -1  # prompt tokens found in the cache when it was first admitted
    num_counted: int = 0  # of its tokens, those computed before it was preempted: their experts have been counted
    stop_ids: frozenset[int] = field(init=False)
    tokens: np.ndarray = field(init=False)  # i32: the prompt, and the output so far of one that was preempted or forked
    # Of `tokens`, see `PrefixNames.name`; while it runs, the table has them. None: also if prefixes have no names.
    names: np.ndarray | None = field(init=False, default=None)
    facts: bytes = field(init=False, default=b"")  # while it waits: see `describe`

    def __post_init__(self) -> None:
        assert self.prompt.dtype == _I32, self.prompt.dtype
        assert self.prompt.ndim == 1, self.prompt.shape
        self.stop_ids = frozenset(self.params.stop_token_ids) if self.params.stop_token_ids else _NO_IDS
        self.tokens = self.prompt

    def bans(self, eos_token_ids: tuple[int, ...]) -> Sequence[int]:
        """Ids that must not be sampled before `min_tokens` output tokens, if there are to be any, ascending."""
        return sorted(self.stop_ids.union(() if self.params.ignore_eos else eos_token_ids))


def describe(request: Request, vocab_size: int) -> bytes:
    """One record of `FACTS`. What a 32-bit field cannot hold is replaced by a value of equal effect."""
    p, prompt_len, limit = request.params, len(request.prompt), request.limit
    min_tokens = min(p.min_tokens, limit - prompt_len)
    return _FACTS.pack(
        request.key,
        request.order,
        request.priority,
        len(request.tokens),
        prompt_len,
        limit,
        prompt_len + min_tokens,
        request.num_cached,
        not p.ignore_eos,
        bool(request.stop_ids),
        p.prompt_logprobs is None,
        False,
        request.seed,
        request.branch,
        prompt_len,
        min_tokens,
        p.top_k if 0 < p.top_k < vocab_size else -1,
        -1 if p.logprobs is None else p.logprobs,
        -1 if p.prompt_logprobs is None else p.prompt_logprobs,
        p.temperature if p.temperature < _FLOAT_MAX else _FLOAT_MAX,
        p.top_p,
        p.min_p,
        p.repetition_penalty if p.repetition_penalty < _FLOAT_MAX else _FLOAT_MAX,
        p.presence_penalty,
        p.frequency_penalty,
        request.num_counted if p.expert_load else -1,
    )


def facts(requests: Sequence[Request]) -> np.ndarray:
    """The records of all, which wait: `FACTS` [A], a copy."""
    return np.frombuffer(bytearray().join([request.facts for request in requests]), FACTS)


def introduction(
    requests: Sequence[Request],
    fact_A: np.ndarray,
    tokens: np.ndarray,
    token_offsets_A1: np.ndarray,
    eos_token_ids: tuple[int, ...],
) -> dict[str, Any]:
    """What a plan says about new requests, besides their slots: its fields. `fact_A`: their facts; `tokens`: theirs, one after
    another."""
    bans_A = [request.bans(eos_token_ids) if request.params.min_tokens else () for request in requests]
    biases_A = [request.params.logit_bias or {} for request in requests]
    bans, ban_offsets = ragged.pack(bans_A, np.int32)
    bias_ids, bias_offsets = ragged.pack([tuple(bias) for bias in biases_A], np.int32)
    bias_values, _ = ragged.pack([tuple(bias.values()) for bias in biases_A], np.float32)
    return {
        "admit_sampling_A": np.ascontiguousarray(fact_A["sampling"]),
        "admit_token_offsets_A1": token_offsets_A1,
        "admit_tokens": tokens,
        "admit_ban_offsets_A1": ban_offsets,
        "admit_bans": bans,
        "admit_bias_offsets_A1": bias_offsets,
        "admit_bias_ids": bias_ids,
        "admit_bias_values": bias_values,
    }
