"""A request as the scheduler sees it, and the fixed-size record of its sampling parameters that a rank gets."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from expertwire.scheduler.sampling_params import SamplingParams

_FLOAT_MAX = float(np.finfo(np.float32).max)


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """One generation asked for. While it runs, its counters are row (`rank`, `slot`) of the `RunningTable`.

    Args:
        key: chosen by the caller, unique among the unfinished requests.
        prompt: i32 [prompt length], token ids.
        params: an output with `n` branches is `n` requests; `params.seed` is not read here.
        branch: which of the `n` outputs this is.
        seed: draws are a function of (seed, branch, position).
    """

    key: int
    prompt: np.ndarray
    params: SamplingParams
    branch: int = 0
    seed: int
    arrival: float = 0.0  # the `now` of `Scheduler.submit`
    limit: int = 0  # prompt and output tokens at most, set by `Scheduler.submit`
    rank: int = -1  # -1 while it waits
    slot: int = -1
    stop_ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        assert self.prompt.dtype == np.int32, self.prompt.dtype
        assert self.prompt.ndim == 1, self.prompt.shape
        self.stop_ids = frozenset(self.params.stop_token_ids or ())

    def bans(self, eos_token_ids: tuple[int, ...]) -> list[int]:
        """Ids that must not be sampled before `min_tokens` output tokens, ascending."""
        if not self.params.min_tokens:
            return []
        return sorted(self.stop_ids.union(() if self.params.ignore_eos else eos_token_ids))

    def sampling(self, vocab_size: int) -> tuple[float, ...]:
        """One record of `plan.SAMPLING_DTYPE`. What a 32-bit field cannot hold is replaced by a value of equal effect."""
        p = self.params
        prompt_len = len(self.prompt)
        return (
            self.seed,
            self.branch,
            prompt_len,
            min(p.min_tokens, self.limit - prompt_len),
            p.top_k if 0 < p.top_k < vocab_size else -1,
            -1 if p.logprobs is None else p.logprobs,
            -1 if p.prompt_logprobs is None else p.prompt_logprobs,
            min(p.temperature, _FLOAT_MAX),
            p.top_p,
            p.min_p,
            min(p.repetition_penalty, _FLOAT_MAX),
            p.presence_penalty,
            p.frequency_penalty,
            0,
        )
