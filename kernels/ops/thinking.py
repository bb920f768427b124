"""Control of reasoning while tokens are sampled: a budget of tokens, a grace window for the sentence, and a minimum.

Reasoning is what an output has between the model's delimiters, in one stretch or several; delimiters do not count, nor does the
prompt, which may open it. With a budget of b tokens and g tokens of grace

    the closing delimiter is the next token where b + g tokens of reasoning have come, or b and the last of them ends a sentence;
    reasoning that is closed cannot be opened again where b tokens have come.

Below a minimum of tokens a drawn token that would end the reasoning, or the output within it, becomes "Wait" (Muennighoff et
al., "s1: Simple test-time scaling", 2025). So a draw is a function of the request's own tokens and parameters: what is kept
between draws, the *state*, follows from the tokens (`state_of`), and nobody asks the host for it.

The state of a sequence is i32 [3]: tokens of the opening delimiter that have come (all of them: within reasoning), tokens of
reasoning, and whether the last of them ends a sentence (1 before the first).

O sampled rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

STATE_SIZE = 3
NO_BUDGET = 2**31 - 1


class ThinkingTokens(NamedTuple):
    """A model's tokens of reasoning, on a device.

    Attributes:
        start: i64, those that open it; the first one comes once.
        end: the one that closes it.
        wait: "Wait", or -1 if no token says so and nothing has a minimum.
        ends_V: bool, `end` and the tokens that end an output.
        ends_sentence_V: bool.
    """

    start: Tensor
    end: int
    wait: int
    ends_V: Tensor
    ends_sentence_V: Tensor


def banned_start(start: Tensor) -> int:
    """Return the index of the token of an opening delimiter that is banned to keep reasoning closed: the one that tells reasoning
    from other things that begin alike, as a message of another channel does."""
    return min(1, len(start) - 1)


def keep_closed(logits_OV: Tensor, state_O3: Tensor, budget_O: Tensor, tokens: ThinkingTokens) -> None:
    """Ban, in place, the token that would open reasoning whose budget is used up.

    Args:
        logits_OV: fp32.
        state_O3: i32.
        budget_O: i32, tokens of reasoning; `NO_BUDGET`: no limit.
        tokens: the model's.
    """
    at = banned_start(tokens.start)
    is_spent_O = (state_O3[:, 0] == at) & (state_O3[:, 1] >= budget_O)
    token_1 = tokens.start[at : at + 1]
    logits_O1 = logits_OV.index_select(1, token_1)
    logits_OV.index_copy_(1, token_1, logits_O1.masked_fill(is_spent_O.unsqueeze(1), -torch.inf))


def reference(
    token_O: Tensor, state_O3: Tensor, budget_O: Tensor, most_O: Tensor, minimum_O: Tensor, tokens: ThinkingTokens
) -> tuple[Tensor, Tensor]:
    """Return the tokens that take the place of drawn ones, i64 [O], and the states behind them.

    Args:
        token_O: i64, drawn; -1 stays.
        state_O3: i32, before them.
        budget_O: i32; `NO_BUDGET`: no limit.
        most_O: i32, budget and grace together.
        minimum_O: i32, at most the budget.
        tokens: the model's.
    """
    matched_O, count_O, ended_O = state_O3.unbind(1)
    is_open_O = matched_O == len(tokens.start)
    is_over_O = is_open_O & (count_O >= torch.where(ended_O > 0, budget_O, most_O))
    waits_O = is_open_O & (count_O < minimum_O) & tokens.ends_V[token_O.clamp_min(0)]
    chosen_O = token_O.masked_fill(waits_O, tokens.wait).masked_fill(is_over_O, tokens.end)
    chosen_O = torch.where(token_O < 0, token_O, chosen_O)
    return chosen_O, advance(state_O3, chosen_O.clamp_min(0), tokens)


def advance(state_O3: Tensor, token_O: Tensor, tokens: ThinkingTokens) -> Tensor:
    """Return the states i32 [O, 3] behind further tokens, i64."""
    num_start = len(tokens.start)
    matched_O, count_O, _ = state_O3.unbind(1)
    is_open_O = matched_O == num_start
    goes_on_O = is_open_O & (token_O != tokens.end)
    matches_O = token_O == tokens.start[matched_O.clamp_max(num_start - 1)]
    begun_O = torch.where(matches_O, matched_O + 1, (token_O == tokens.start[0]).int())
    return torch.stack(
        (
            torch.where(is_open_O, goes_on_O * num_start, begun_O),
            count_O + goes_on_O,
            ~goes_on_O | tokens.ends_sentence_V[token_O],
        ),
        dim=1,
    ).int()


def state_of(
    output: Iterable[int], start: tuple[int, ...], end: int, ends_sentence: frozenset[int], *, is_open: bool
) -> tuple[int, int, int]:
    """Return the state behind an output.

    Args:
        output: its tokens.
        start, end, ends_sentence: see `ThinkingTokens`.
        is_open: whether the prompt ends within reasoning.
    """
    matched, count, last = len(start) if is_open else 0, 0, -1
    for token in output:
        if matched < len(start):
            matched = matched + 1 if token == start[matched] else int(token == start[0])
            last = -1
        elif token == end:
            matched, last = 0, -1
        else:
            count, last = count + 1, token
    return matched, count, int(last < 0 or last in ends_sentence)
