"""The offline API: an engine and its frontend in the caller's process, with the signatures of vLLM's `LLM`."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from expertwire.deploy import runtime
from expertwire.deploy.options import ENGINE_FIELDS
from expertwire.engine.config.engine_config import EngineConfig, ModelInfo
from expertwire.engine.frontend.api import EngineFailed, RequestOptions
from expertwire.engine.frontend.chat import Chat
from expertwire.engine.frontend.frontend import Frontend
from expertwire.engine.frontend.groups import Groups, check_params
from expertwire.engine.frontend.prompts import Prompt, score_params, with_effort
from expertwire.engine.frontend.tokenizer import Tokenizer
from expertwire.generation import Job, ProgressBar, Run, delayed_interrupt
from expertwire.group_generation import GroupJob, GroupsRun
from expertwire.outputs import CompletionOutput, RequestOutput, RewardOutput
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.strategies.base import Strategy

__all__ = ["LLM", "CompletionOutput", "EngineFailed", "RequestOutput", "RewardOutput", "SamplingParams"]

Message = Mapping[str, Any]


class LLM:
    """A model that generates text. Use it as a context manager, or call `close`.

    Args:
        model: folder of a Hugging Face checkpoint, or its name on the hub ("org/name").
        options: other fields of `EngineConfig` (`dtype`, `device`, `ep_size`, `launcher`, `load_format`, `max_model_len`,
            `max_num_batched_tokens`, `max_num_seqs`, `seed`, ...).

    Raises:
        TypeError: there is no such option; the message lists them.
        ValueError: an option or the checkpoint is not usable; the message says why.
        EngineFailed: the engine could not start.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        _check_names(options)
        config = EngineConfig(model=str(model), **options)
        self._config = config
        with contextlib.ExitStack() as stack:
            self._frontend = stack.enter_context(runtime.open_frontend(config))
            # Without `close`, the engine ends with this object or the interpreter.
            self._closing = weakref.finalize(self, stack.pop_all().close)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def model_info(self) -> ModelInfo:
        """The model and its limits."""
        return self._frontend.model_info

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer; None for random weights (`load_format="dummy"`) of a folder without one."""
        return self._frontend.tokenizer

    @property
    def frontend(self) -> Frontend:
        """The engine's frontend, for what runs requests of several models together (`CascadeLLM`).

        Raises:
            ValueError: this `LLM` is closed.
        """
        if not self._closing.alive:
            raise ValueError("this LLM is closed")
        return self._frontend

    @property
    def queue_capacity(self) -> int:
        """Requests that may wait at once."""
        limit = self._config.max_queued_requests_per_tenant
        return min(self._config.max_queued_requests, limit or self._config.max_queued_requests)

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the model's defaults, which `generation_config` chooses."""
        return self.model_info.sampling_params()

    def generate(
        self,
        prompts: Prompt | Mapping[str, Any] | Sequence[Prompt | Mapping[str, Any]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        strategy: Strategy | Sequence[Strategy] | None = None,
        use_tqdm: bool = True,
        priority: int | Sequence[int] | None = None,
        tenant: str | Sequence[str] | None = None,
        cache_salt: str | Sequence[str] | None = None,
    ) -> list[RequestOutput]:
        """Generate outputs for prompts; return them in the order of the prompts.

        An interrupt (Ctrl-C) aborts the running requests; the `LLM` remains usable.

        Args:
            prompts: a text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}, or a list of these; a
                dictionary may have its own "cache_salt".
            sampling_params: for all prompts, or a list with one for each; None takes `get_default_sampling_params`.
            strategy: of test-time compute, for all prompts or one for each, for instance `BestOfN(8, verifier=f)` of
                `expertwire.strategies`. It starts, prunes and selects branches; `n` must be 1. None: independent outputs.
            use_tqdm: show a progress bar.
            priority: for all prompts, or one for each; lower is served earlier with the scheduling policy "priority". None: 0.
            tenant: name for fair sharing and limits, for all prompts or one for each. None: "".
            cache_salt: cached prefixes are shared only within one tenant and salt; for all prompts or one for each. None: "".

        Raises:
            ValueError: a prompt or its parameters are invalid; all are checked before any is generated.
            RuntimeError: a strategy or its verifier has failed.
            EngineFailed: the engine has failed; the message names the rank.
        """
        items = as_list(prompts)
        plain = [plain_prompt(prompt) for prompt in items]
        options = _options_of(items, priority=priority, tenant=tenant, cache_salt=cache_salt)
        return self._run(self._jobs(plain, sampling_params, options), use_tqdm, strategy)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        strategy: Strategy | Sequence[Strategy] | None = None,
        use_tqdm: bool = True,
        priority: int | Sequence[int] | None = None,
        tenant: str | Sequence[str] | None = None,
        cache_salt: str | Sequence[str] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        reasoning_effort: str | None = None,
        thinking: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Generate answers in one conversation or several, rendered with the model's chat template.

        Args:
            messages: dictionaries with "role" and "content", or a list of such lists.
            sampling_params: as in `generate`; so is `strategy`.
            use_tqdm: show a progress bar.
            priority: as in `generate`; so are `tenant` and `cache_salt`.
            add_generation_prompt: end the prompt with the start of the assistant's answer.
            continue_final_message: continue the last message; excludes `add_generation_prompt`.
            chat_template: name of one of the model's templates, or the Jinja source of another.
            tools: JSON schemas of functions.
            reasoning_effort: such as "low", "medium" or "high" for gpt-oss; where the template does not read it, reasoning models
                also take "none" and "minimal": it turns thinking off or on and sets a `thinking_budget` that is unset.
            thinking: whether the model thinks, if its template has a switch for it.
            chat_template_kwargs: further variables of the template.

        Raises:
            ValueError: as in `generate`, or there is no chat template, it refuses the messages, or it does not read a variable.
            EngineFailed: the engine has failed; the message names the rank.
        """
        if self.tokenizer is None:
            raise ValueError("chat needs a tokenizer, and the model has none; use generate with token ids")
        several = isinstance(messages, Sequence) and messages and isinstance(messages[0], (list, tuple))
        conversations: Any = messages if several else [messages]
        chats = [
            Chat(
                messages=conversation,
                tools=tools,
                reasoning_effort=reasoning_effort,
                thinking=thinking,
                chat_template_kwargs={} if chat_template_kwargs is None else chat_template_kwargs,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template=chat_template,
            )
            for conversation in conversations
        ]
        texts = [self.tokenizer.render_chat(chat) for chat in chats]
        # The template writes the special tokens.
        prompts = [(text, self.tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        each = _options_of(conversations, priority=priority, tenant=tenant, cache_salt=cache_salt)
        return self._run(self._jobs(prompts, sampling_params, each, chats), use_tqdm, strategy)

    def reward(
        self, prompts: Prompt | Mapping[str, Any] | Sequence[Prompt | Mapping[str, Any]], *, use_tqdm: bool = True
    ) -> list[np.ndarray]:
        """Return the scores of each prompt, f32 [labels], of a reward model or classifier.

        They are what the model's head gives for the last token: a reward, or logits of labels, as transformers'
        `*ForSequenceClassification` returns them. What earlier calls have computed of a prompt is found in the prefix cache.

        Args:
            prompts: as in `generate`.
            use_tqdm: show a progress bar.

        Raises:
            ValueError: a prompt is invalid, or the model generates text.
            EngineFailed: the engine has failed; the message names the rank.
        """
        return [output.scores for output in self.reward_outputs(prompts, use_tqdm=use_tqdm)]

    def reward_outputs(
        self, prompts: Prompt | Mapping[str, Any] | Sequence[Prompt | Mapping[str, Any]], *, use_tqdm: bool = True
    ) -> list[RewardOutput]:
        """Return the scores of each prompt as `reward` does, and how many tokens were computed for them."""
        info, items = self.model_info, as_list(prompts)
        if not info.num_labels:
            raise ValueError(f"{info.architecture} generates text and has no labels: use generate")
        plain = [plain_prompt(prompt) for prompt in items]
        found = self._run(self._jobs(plain, score_params(info), _options_of(items)), use_tqdm, None)
        return [
            RewardOutput(
                scores=_scores(output, info.num_labels),
                num_prompt_tokens=len(output.prompt_token_ids),
                num_cached_tokens=output.num_cached_tokens,
            )
            for output in found
        ]

    def stats(self) -> dict[str, Any]:
        """Return the engine's counters and gauges.

        Raises:
            EngineFailed: the engine has failed.
        """
        return self._frontend.stats()

    def close(self) -> None:
        """Stop the engine and everything it started. Idempotent."""
        self._closing()

    def _jobs(
        self,
        prompts: Sequence[tuple[str | None, Prompt]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        options: Sequence[RequestOptions],
        chats: Sequence[Chat] | None = None,
    ) -> list[Job]:
        frontend = self.frontend
        sampling_params = self.get_default_sampling_params() if sampling_params is None else sampling_params
        params = one_each("sampling_params", sampling_params, len(prompts))
        jobs = []
        for index, ((text, prompt), param, option) in enumerate(zip(prompts, params, options, strict=True)):
            if not isinstance(param, SamplingParams):
                raise ValueError(f"sampling_params must be SamplingParams or a list of them, got {param!r}")
            try:
                tokens = frontend.encode(prompt, param)
                if chats is not None:
                    param = with_effort(param, chats[index], len(tokens), self.model_info, self.tokenizer)
            except ValueError as error:
                raise ValueError(f"prompt {index}: {error}") from error
            jobs.append(Job(index, text, tokens, param, option))
        return jobs

    def _run(
        self, jobs: list[Job], use_tqdm: bool, strategy: Strategy | Sequence[Strategy] | None
    ) -> list[RequestOutput]:
        capacity = self.queue_capacity
        if strategy is None:
            _run_all(Run(self._frontend, jobs, capacity), use_tqdm)
            return [job.output() for job in jobs]
        strategies = one_each("strategy", strategy, len(jobs))
        for job in jobs:
            check_params(job.params)
        group_jobs = [
            GroupJob(job.index, job.text, job.tokens, job.params, job.options, each)
            for job, each in zip(jobs, strategies, strict=True)
        ]
        with contextlib.closing(Groups(self._frontend)) as groups:
            _run_all(GroupsRun(groups, group_jobs, capacity), use_tqdm)
        return [job.output() for job in group_jobs]


def _run_all(run: Run | GroupsRun, use_tqdm: bool) -> None:
    """Run all prompts; an interrupt or an error aborts those that are open."""
    with ProgressBar(run.unfinished, use_tqdm) as progress, delayed_interrupt() as check_interrupt:
        try:
            while run.unfinished:
                run.submit()
                progress.show(*run.poll())
                check_interrupt()
        finally:
            run.abort()


def _scores(output: RequestOutput, num_labels: int) -> np.ndarray:
    positions = output.outputs[0].logprobs
    assert positions is not None, "scores were not asked for"
    return np.array([positions[0][label].logprob for label in range(num_labels)], np.float32)


def _check_names(options: Mapping[str, Any]) -> None:
    for name in options:
        if name not in ENGINE_FIELDS:
            raise TypeError(f"LLM has no option {name!r}; there are {', '.join(ENGINE_FIELDS)}")


def as_list(prompts: Any) -> Sequence[Any]:
    """Return a list of prompts; a list of integers is one prompt."""
    if isinstance(prompts, (str, Mapping, np.ndarray)):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise ValueError(f"prompts must be a string, token ids, or a list of these, got {type(prompts).__name__}")
    return [prompts] if len(prompts) and all(isinstance(item, (int, np.integer)) for item in prompts) else prompts


def plain_prompt(prompt: Any) -> tuple[str | None, Prompt]:
    """Return the prompt's text, if it has one, and the prompt that the frontend encodes."""
    if isinstance(prompt, Mapping):
        if not {"prompt", "prompt_token_ids", "cache_salt"}.issuperset(prompt) or not prompt.keys() - {"cache_salt"}:
            raise ValueError(f"a prompt's dictionary must have 'prompt' or 'prompt_token_ids', got {sorted(prompt)}")
        if isinstance(prompt.get("prompt_token_ids"), str):
            raise ValueError(f"prompt_token_ids must be token ids, got {prompt['prompt_token_ids']!r:.100}")
        text = prompt.get("prompt")
        return text, prompt.get("prompt_token_ids", text)
    return (prompt if isinstance(prompt, str) else None), prompt


def one_each(field: str, value: Any, count: int) -> list[Any]:
    """Return a list with a value for each prompt, from one for all or a list."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{field} must be one value, or one for each prompt ({count}), got {len(value)}")
    return list(value)


def _options_of(prompts: Sequence[Any], **values: Any) -> list[RequestOptions]:
    """Return the options of each prompt; those in a prompt's dictionary take precedence."""
    each = {field: one_each(field, value, len(prompts)) for field, value in values.items() if value is not None}
    options = []
    for index, prompt in enumerate(prompts):
        own = {"cache_salt": prompt["cache_salt"]} if isinstance(prompt, Mapping) and "cache_salt" in prompt else {}
        try:
            options.append(RequestOptions(**{field: of_each[index] for field, of_each in each.items()} | own))
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from error
    return options
