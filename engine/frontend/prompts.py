"""Prompts: the checks of what a client sends, made once, before anything reaches the controller."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from expertwire.engine.config.engine_config import ModelInfo
from expertwire.engine.frontend.chat import EFFORT_TENTHS, Chat, ChatText
from expertwire.engine.frontend.tokenizer import Tokenizer
from expertwire.scheduler.sampling_params import SamplingParams

Prompt = str | Sequence[int] | np.ndarray | Chat | ChatText


def encode_prompt(prompt: Prompt, params: SamplingParams, info: ModelInfo, tokenizer: Tokenizer | None) -> np.ndarray:
    """Return the tokens of a prompt, i32 [length], having checked it and its parameters against the model.

    Raises:
        ValueError: the engine cannot serve them; names the field and what is allowed.
    """
    check_params(params, info, tokenizer)
    if isinstance(prompt, (str, Chat, ChatText)):
        check_has_tokenizer(prompt, tokenizer is not None)
        assert tokenizer is not None
        tokens = np.array(tokenize(prompt, tokenizer), np.int64)
    else:
        tokens = _to_array(prompt, info)
    check_tokens(tokens, params, info)
    return tokens.astype(np.int32)


def tokenize(prompt: str | Chat | ChatText, tokenizer: Tokenizer, max_chars: int | None = None) -> list[int]:
    """Return the tokens of a text or a chat.

    Args:
        prompt: the text or chat.
        tokenizer: the model's.
        max_chars: most characters of the text that a chat is rendered to; None: no limit.

    Raises:
        ValueError: the text is not valid Unicode, or the chat cannot be rendered.
    """
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    chat = prompt.parse() if isinstance(prompt, ChatText) else prompt
    return tokenizer.encode_chat(chat, max_chars)


def with_effort(
    params: SamplingParams, prompt: Prompt, num_tokens: int, info: ModelInfo, tokenizer: Tokenizer | None
) -> SamplingParams:
    """Return the parameters with the thinking budget of a chat's reasoning effort, if its template does not read the effort.

    A budget that is set stays.

    Args:
        params: as the client sends them.
        prompt: the prompt, which has been encoded.
        num_tokens: its length.
        info: the model.
        tokenizer: the model's.

    Raises:
        ValueError: the ranks could not tell where reasoning ends, or `min_thinking_tokens` is more than the budget.
    """
    if (
        not isinstance(prompt, (Chat, ChatText))
        or prompt.reasoning_effort is None
        or params.thinking_budget is not None
    ):
        return params
    if tokenizer is None or tokenizer.reads_effort(prompt.chat_template):
        return params
    most = params.most_output_tokens(num_tokens, info.max_model_len)
    params = dataclasses.replace(params, thinking_budget=most * EFFORT_TENTHS[prompt.reasoning_effort] // 10)
    _check_thinking(params, info, tokenizer)
    return params


def check_params(params: SamplingParams, info: ModelInfo, tokenizer: Tokenizer | None) -> None:
    """Check parameters against the model, before anybody looks at the prompt.

    Raises:
        ValueError: the engine cannot serve them; names the field and what is allowed.
    """
    if info.num_labels and params != score_params(info):
        raise ValueError(f"{info.architecture} scores texts and generates none: use LLM.reward")
    if params.stop and tokenizer is None:
        raise ValueError("stop needs a tokenizer, and the model has none; use stop_token_ids")
    check_ids("stop_token_ids", params.stop_token_ids or (), info.vocab_size)
    check_ids("logit_bias", params.logit_bias or (), info.vocab_size)
    _check_bans(params, info)
    if params.controls_thinking:
        _check_thinking(params, info, tokenizer)
    for field in ("max_queued_requests", "max_queued_requests_per_tenant"):
        if params.n > (allowed := getattr(info, field)):
            raise ValueError(f"n must be at most {field} = {allowed}, got {params.n}")
    if params.expert_load and not info.num_experts:
        raise ValueError(f"expert_load must be False: {info.architecture} has no experts; got True")
    for field in ("logprobs", "prompt_logprobs"):
        if (getattr(params, field) or 0) > info.vocab_size:
            raise ValueError(
                f"{field} must be at most the vocabulary's {info.vocab_size}, got {getattr(params, field)}"
            )


def score_params(info: ModelInfo) -> SamplingParams:
    """Return the sampling parameters of a request to a model with labels, whose scores come as log-probabilities."""
    return SamplingParams(temperature=0.0, max_tokens=1, logprobs=info.num_labels, ignore_eos=True)


def check_tokens(tokens: np.ndarray, params: SamplingParams, info: ModelInfo) -> None:
    """Check the tokens of a prompt, whose parameters have been checked.

    Raises:
        ValueError: the engine cannot serve them; names the field and what is allowed.
    """
    check_length(len(tokens), info)
    check_ids("prompt", (int(tokens.min()), int(tokens.max())), info.vocab_size)
    params.check_cost(len(tokens), info.max_model_len)


def check_length(num_tokens: int, info: ModelInfo) -> None:
    """Check the number of tokens of a prompt.

    Raises:
        ValueError: there are none, or more than the model can take.
    """
    if num_tokens == 0:
        raise ValueError("prompt must have at least one token, got none")
    if num_tokens >= info.max_model_len:
        raise ValueError(
            f"prompt has {num_tokens} tokens; max_model_len {info.max_model_len} allows at most "
            f"{info.max_model_len - 1}, as one output token must fit"
        )


def check_has_tokenizer(prompt: str | Chat | ChatText, has_tokenizer: bool) -> None:
    """Raise ValueError for a text or chat that nothing can tokenise."""
    if not has_tokenizer:
        kind = "text prompt" if isinstance(prompt, str) else "chat"
        raise ValueError(f"a {kind} needs a tokenizer, and the model has none; send token ids")


def _to_array(prompt: Sequence[int] | np.ndarray, info: ModelInfo) -> np.ndarray:
    if not isinstance(prompt, (Sequence, np.ndarray)) or isinstance(prompt, (bytes, bytearray)):
        raise ValueError(f"prompt must be a string or a list of token ids, got {type(prompt).__name__}")
    check_length(len(prompt), info)
    try:
        tokens = np.asarray(prompt)
    except (ValueError, OverflowError):
        tokens = None
    if tokens is None or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(f"prompt must be a string or a flat list of integer token ids, got {prompt!r:.100}")
    return tokens


def _check_bans(params: SamplingParams, info: ModelInfo) -> None:
    """Refuse `min_tokens` where nothing else can be sampled than what it bans."""
    eos = () if params.ignore_eos else info.eos_token_ids
    if params.min_tokens and len({*(params.stop_token_ids or ()), *eos}) >= info.vocab_size:
        raise ValueError(
            f"min_tokens must be 0 if stop_token_ids and the end-of-sequence ids are the whole vocabulary "
            f"({info.vocab_size} ids), as they are banned before it; got {params.min_tokens}"
        )


def _check_thinking(params: SamplingParams, info: ModelInfo, tokenizer: Tokenizer | None) -> None:
    """Refuse to control reasoning that the ranks could not tell."""
    field = "min_thinking_tokens" if params.thinking_budget is None else "thinking_budget"
    if tokenizer is None:
        raise ValueError(f"{field} needs a tokenizer that knows how reasoning is delimited, and the model has none")
    ids, output_format = tokenizer.thinking_ids, tokenizer.output_format
    if ids is None or not ids.fits(info.vocab_size):
        why = "has no reasoning"
        if output_format.reasoning is not None:
            why = f"ends reasoning with {output_format.reasoning[1]!r}, which is no single token of the model"
        raise ValueError(
            f"{field} must be unset for this model: its output format {output_format.name!r} {why}; use max_tokens"
        )
    if params.min_thinking_tokens and ids.wait is None:
        raise ValueError(
            f"min_thinking_tokens must be 0 for this model: no token of its vocabulary stands for 'Wait', got "
            f"{params.min_thinking_tokens}"
        )


def check_ids(field: str, ids: Iterable[int], vocab_size: int) -> None:
    """Raise ValueError if one of the ids is no token of the vocabulary."""
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"{field} must be token ids in [0, {vocab_size}), got {token}")
