"""Results of the offline API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from expertwire.engine.frontend.api import LogprobDict
from expertwire.engine.frontend.group_run import Fate
from expertwire.strategies.accounting import TokenCounts


@dataclass
class CompletionOutput:
    """One of a request's `n` outputs.

    Attributes:
        index: index of the output, from 0.
        text: empty without a tokenizer.
        token_ids: the output's tokens, including an end-of-sequence or stop token.
        logprobs: one entry per token if requested: token id -> `Logprob`, the sampled token first.
        cumulative_logprob: sum over the sampled tokens, if `logprobs` was requested.
        expert_load: if requested, number of computed tokens of prompt and output by layer and expert. Tokens found in the prefix
            cache and the last token, which is not computed, do not count.
        finish_reason: "stop" or "length".
        stop_reason: the stop string or the id among `stop_token_ids` that ended the output.
        seed: seed that, with `index` and the prompt, reproduces the output.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[LogprobDict] | None = None
    cumulative_logprob: float | None = None
    expert_load: list[list[int]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    seed: int | None = None


@dataclass
class GroupBranch:
    """One of a group's branches.

    Attributes:
        index: of the branch, in the order of their starts.
        parent: index of the branch that it continues; None if it began at the prompt.
        num_shared: output tokens that it has from its parent.
        fate: "kept" if it ended by itself, else "pruned".
        text, token_ids: its output, with that of its parent; a pruned branch has what it had by then.
        finish_reason: "stop" or "length" if it was kept.
        answer: what the strategy extracted from its text.
        score: the verifier's last score of it; None if there is none, or the verifier failed.
        problems: why scores are missing.
    """

    index: int
    parent: int | None
    num_shared: int
    fate: Fate
    text: str
    token_ids: list[int]
    finish_reason: str | None
    answer: str | None
    score: float | None
    problems: list[str]

    @property
    def num_own_tokens(self) -> int:
        """Tokens that were sampled for this branch alone."""
        return len(self.token_ids) - self.num_shared


@dataclass
class GroupOutput:
    """The way in which a strategy came to the outputs of a prompt.

    Attributes:
        branches: all branches, by index.
        selected: indices of those that are the request's outputs, best first.
        answer: the answer chosen, if the strategy chooses among answers.
        weights: what each answer got, in the order of first appearance; None without answers.
        reason: why, in a few words.
        tokens: what became of the tokens sampled; each counts once.
    """

    branches: list[GroupBranch]
    selected: list[int]
    answer: str | None
    weights: Mapping[str, float] | None
    reason: str
    tokens: TokenCounts


@dataclass
class RequestOutput:
    """The outputs for one prompt.

    Attributes:
        request_id: unique within an `LLM`.
        prompt: text of the prompt; None for token ids.
        prompt_token_ids: tokens of the prompt.
        prompt_logprobs: if requested, None for the first token, then token id -> `Logprob`, the prompt's token first.
        outputs: the `n` outputs.
        finished: whether all outputs have ended.
        num_cached_tokens: number of prompt tokens that the first output found in the prefix cache.
        group: how the strategy came to the outputs; None without one. Outputs are then those selected, best first.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[LogprobDict | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
    group: GroupOutput | None = None


@dataclass(frozen=True, kw_only=True)
class RewardOutput:
    """The scores of one prompt.

    Attributes:
        scores: f32 [labels].
        num_prompt_tokens: tokens of the prompt.
        num_cached_tokens: those that were found in the prefix cache.
    """

    scores: np.ndarray
    num_prompt_tokens: int
    num_cached_tokens: int

    @property
    def num_computed_tokens(self) -> int:
        """Tokens that the engine computed for the scores."""
        return self.num_prompt_tokens - self.num_cached_tokens
