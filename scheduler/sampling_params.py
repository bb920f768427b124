"""Sampling parameters, named as in vLLM, and the record of them in every slot of a rank.

To add a field: declare it in `SamplingParams`, with `rank_field` if the sampler reads it. Its dtype
there puts it into `SAMPLING_DTYPE`, and with that into requests, plans and the ranks' tables; its
bounds are checked.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np

from expertwire.scheduler.config import is_int, is_number

MAX_LOGPROBS = 64
MAX_BRANCHES = 256
# What a request may ask for; each bounds work or memory that one small message would cause.
MAX_STOP = 1024
MAX_STOP_CHARS = 65_536  # of all strings together
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIAS = 4096
MAX_OUTPUT_ENTRIES = 1 << 24
MAX_PROMPT_ENTRIES = 1 << 21
MAX_THINKING = 1 << 30
_MAX_LENGTHS = (("stop", MAX_STOP), ("stop_token_ids", MAX_STOP_TOKEN_IDS), ("logit_bias", MAX_LOGIT_BIAS))
_FLOAT_MAX = float(np.finfo(np.float32).max)


def rank_field(default: Any, dtype: type, *, low: float | None = None, high: float = math.inf) -> Any:
    """Declare a field that ranks read: its dtype in `SAMPLING_DTYPE`, and for a number its bounds, both included."""
    return dataclasses.field(default=default, metadata={"dtype": dtype, "low": low, "high": high})


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Sampling parameters of one request.

    Args:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: keep the smallest set of tokens whose probabilities add up to this, in (0, 1].
        top_k: keep the k most probable tokens; -1 keeps all.
        min_p: drop tokens below this fraction of the most probable one, in [0, 1].
        max_tokens: output tokens at most; None: as many as fit in `max_model_len` after the prompt.
        min_tokens: end-of-sequence and stop ids cannot be sampled before this many output tokens.
        seed: draws are a function of (seed, branch, position) alone; None picks one and reports it.
        stop: strings that end the output; not part of the returned text. At most 1,024, of 65,536 characters together.
        stop_token_ids: token ids that end the output, besides the model's end-of-sequence ids; at most 1,024.
        thinking_budget: tokens of reasoning after which its closing delimiter is the next token; None: no limit.
        thinking_grace: tokens beyond the budget within which a sentence of the reasoning may end; it is closed there, or
            behind them.
        min_thinking_tokens: before this many tokens of reasoning, at most the budget, a token that would end it, or the
            output within it, becomes "Wait".
        ignore_eos: go on after an end-of-sequence id.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt
            or output; in [0.01, 100].
        presence_penalty: subtracted once from tokens seen in the output, in [-2, 2].
        frequency_penalty: subtracted per occurrence in the output, in [-2, 2].
        logit_bias: token id -> value added to its logit; at most 4,096.
        logprobs: report the sampled token's log-probability and this many top ones (0: only the
            sampled one).
        prompt_logprobs: the same for the prompt's tokens.
        expert_load: report how many of an output's computed tokens went to each expert of each layer.
        n: number of independent outputs.
        skip_special_tokens: leave special tokens out of the text.

    Raises:
        ValueError: names the field and the values it allows.
    """

    temperature: float = rank_field(1.0, np.float32, low=0.0)
    top_p: float = rank_field(1.0, np.float32)
    top_k: int = -1
    min_p: float = rank_field(0.0, np.float32, low=0.0, high=1.0)
    max_tokens: int | None = None
    min_tokens: int = 0
    seed: int | None = None
    stop: str | list[str] | tuple[str, ...] | None = None
    stop_token_ids: list[int] | tuple[int, ...] | None = None
    ignore_eos: bool = False
    repetition_penalty: float = rank_field(1.0, np.float32, low=0.01, high=100.0)
    presence_penalty: float = rank_field(0.0, np.float32, low=-2.0, high=2.0)
    frequency_penalty: float = rank_field(0.0, np.float32, low=-2.0, high=2.0)
    logit_bias: Mapping[int, float] | None = None
    logprobs: int | None = rank_field(None, np.int32)
    prompt_logprobs: int | None = rank_field(None, np.int32)
    expert_load: bool = False
    n: int = 1
    skip_special_tokens: bool = True
    thinking_budget: int | None = rank_field(None, np.int32)
    thinking_grace: int = rank_field(0, np.int32)
    min_thinking_tokens: int = rank_field(0, np.int32)

    def __post_init__(self) -> None:
        for field, kinds, allowed in (
            ("stop", (str, list, tuple), "a string or a list of strings"),
            ("stop_token_ids", (list, tuple), "a list of token ids"),
            ("logit_bias", (Mapping,), "a dictionary of token ids and values"),
        ):
            if getattr(self, field) is not None and not isinstance(getattr(self, field), kinds):
                raise ValueError(f"{field} must be None or {allowed}, got {getattr(self, field)!r}")
        check_lengths({} if isinstance(self.stop, str) else {"stop": self.stop or ()})
        check_lengths({"stop_token_ids": self.stop_token_ids or (), "logit_bias": self.logit_bias or {}})
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        stop_token_ids, logit_bias = tuple(self.stop_token_ids or ()), dict(self.logit_bias or {})
        for field, value in (("stop", stop), ("stop_token_ids", stop_token_ids), ("logit_bias", logit_bias)):
            object.__setattr__(self, field, value)
        self._check_numbers()
        if any(not isinstance(text, str) or not text for text in stop):
            raise ValueError(f"stop must be non-empty strings, got {self.stop!r:.100}")
        if (total := sum(map(len, stop))) > MAX_STOP_CHARS:
            raise ValueError(f"stop must have at most {MAX_STOP_CHARS} characters in all, got {total}")
        if any(not is_int(i) or i < 0 for i in stop_token_ids):
            raise ValueError(f"stop_token_ids must be token ids >= 0, got {list(stop_token_ids)!r:.100}")
        for token, bias in logit_bias.items():
            if not is_int(token) or token < 0 or not is_number(bias) or not -100 <= bias <= 100:
                raise ValueError(
                    f"logit_bias must map token ids >= 0 to values in [-100, 100], got {{{token!r}: {bias!r}}}"
                )

    def _check_numbers(self) -> None:
        for field, low, high in _BOUNDS:
            value = getattr(self, field)
            if not is_number(value) or not low <= value <= high:
                allowed = f"in [{low:g}, {high:g}]" if high < math.inf else f">= {low:g}"
                raise ValueError(f"{field} must be a finite number {allowed}, got {value!r}")
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p!r}")
        if not is_int(self.top_k) or (self.top_k < 1 and self.top_k not in (-1, 0)):
            raise ValueError(f"top_k must be -1 (all) or an integer >= 1, got {self.top_k!r}")
        if self.max_tokens is not None and (not is_int(self.max_tokens) or self.max_tokens < 1):
            raise ValueError(f"max_tokens must be None (what fits) or an integer >= 1, got {self.max_tokens!r}")
        most = 2**31 - 1 if self.max_tokens is None else self.max_tokens
        if not is_int(self.min_tokens) or not 0 <= self.min_tokens <= most:
            bound = str(most) if self.max_tokens is None else f"max_tokens = {most}"
            raise ValueError(f"min_tokens must be an integer in [0, {bound}], got {self.min_tokens!r}")
        if self.seed is not None and (not is_int(self.seed) or not -(2**63) <= self.seed < 2**63):
            raise ValueError(f"seed must be None or a 64-bit integer, got {self.seed!r}")
        if not is_int(self.n) or not 1 <= self.n <= MAX_BRANCHES:
            raise ValueError(f"n must be an integer in [1, {MAX_BRANCHES}], got {self.n!r}")
        for field in ("logprobs", "prompt_logprobs"):
            value = getattr(self, field)
            if value is not None and (not is_int(value) or not 0 <= value <= MAX_LOGPROBS):
                raise ValueError(f"{field} must be None or an integer in [0, {MAX_LOGPROBS}], got {value!r}")
        self._check_thinking()
        for field in ("expert_load", "ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field} must be True or False, got {getattr(self, field)!r}")

    def _check_thinking(self) -> None:
        budget, grace, minimum = self.thinking_budget, self.thinking_grace, self.min_thinking_tokens
        if budget is not None and (not is_int(budget) or not 0 <= budget <= MAX_THINKING):
            raise ValueError(
                f"thinking_budget must be None (no limit) or an integer in [0, {MAX_THINKING}], got {budget!r}"
            )
        if not is_int(grace) or not 0 <= grace <= MAX_THINKING:
            raise ValueError(f"thinking_grace must be an integer in [0, {MAX_THINKING}], got {grace!r}")
        if grace and budget is None:
            raise ValueError(f"thinking_grace {grace} has no effect without thinking_budget; set both")
        if not is_int(minimum) or not 0 <= minimum <= (MAX_THINKING if budget is None else budget):
            bound = str(MAX_THINKING) if budget is None else f"thinking_budget = {budget}"
            raise ValueError(f"min_thinking_tokens must be an integer in [0, {bound}], got {minimum!r}")

    @property
    def controls_thinking(self) -> bool:
        """True if reasoning has a budget or a minimum."""
        return self.thinking_budget is not None or self.min_thinking_tokens > 0

    def most_output_tokens(self, num_prompt_tokens: int, max_model_len: int) -> int:
        """Return the number of tokens at which an output ends."""
        room = max_model_len - num_prompt_tokens
        return room if self.max_tokens is None else min(self.max_tokens, room)

    def check_cost(self, num_prompt_tokens: int, max_model_len: int) -> None:
        """Refuse a request for more tokens and log-probabilities than one request may have.

        Raises:
            ValueError: names the fields and the number that is allowed.
        """
        num_tokens = self.most_output_tokens(num_prompt_tokens, max_model_len)
        if (total := self.n * num_tokens * (1 + (self.logprobs or 0))) > MAX_OUTPUT_ENTRIES:
            raise ValueError(
                f"n x max_tokens x (1 + logprobs) must be at most {MAX_OUTPUT_ENTRIES}, got {self.n} x {num_tokens} x "
                f"{1 + (self.logprobs or 0)} = {total}"
            )
        if (total := num_prompt_tokens * (1 + (self.prompt_logprobs or 0))) > MAX_PROMPT_ENTRIES and (
            self.prompt_logprobs is not None
        ):
            raise ValueError(
                f"prompt tokens x (1 + prompt_logprobs) must be at most {MAX_PROMPT_ENTRIES}, got {num_prompt_tokens} x "
                f"{1 + self.prompt_logprobs} = {total}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary that JSON can carry and `from_dict` reads back."""
        return dict(zip(_NAMES, _get_fields(self), strict=True))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> SamplingParams:
        """Return the inverse of `to_dict`; JSON turns the keys of `logit_bias` into strings."""
        bias = {int(token): value for token, value in (fields.get("logit_bias") or {}).items()}
        return cls(**{**fields, "logit_bias": bias})

    def rank_values(self) -> list[float]:
        """Return the values of the `rank_field`s: -1 for None, and the largest fp32 for what fp32 cannot hold."""
        values = _get_rank_fields(self)
        return [-1 if value is None else value if value < _FLOAT_MAX else _FLOAT_MAX for value in values]


def check_lengths(fields: Mapping[str, Any]) -> None:
    """Refuse lists that are too long, before anybody looks at their entries.

    Args:
        fields: fields of `SamplingParams` by name, of which those that are lists count.

    Raises:
        ValueError: names the field and the number of entries that is allowed.
    """
    for field, allowed in _MAX_LENGTHS:
        if (length := len(fields.get(field, ()))) > allowed:
            raise ValueError(f"{field} must have at most {allowed} entries, got {length}")


_NAMES = tuple(field.name for field in dataclasses.fields(SamplingParams))
_get_fields = attrgetter(*_NAMES)
_RANK_FIELDS = [field for field in dataclasses.fields(SamplingParams) if field.metadata]
_BOUNDS = [
    (field.name, field.metadata["low"], field.metadata["high"])
    for field in _RANK_FIELDS
    if field.metadata["low"] is not None
]
_get_rank_fields = attrgetter(*(field.name for field in _RANK_FIELDS))

# The sampling state of a slot, sent to its rank once, when the request is admitted.
SAMPLING_DTYPE = np.dtype(
    [
        ("seed", np.int64),
        ("branch", np.int32),
        ("prompt_len", np.int32),  # of the client's prompt, also when a preempted request comes back with its output
        ("min_tokens", np.int32),
        ("top_k", np.int32),  # -1: all
        ("experts_from", np.int32),  # tokens from this position on have their experts counted; -1: none
        ("is_long", np.int32),  # 1: see `SchedulerConfig.original_max_position_embeddings`
        *((field.name, field.metadata["dtype"]) for field in _RANK_FIELDS),
    ]
)
