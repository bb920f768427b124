"""Verifiers that are models: reward models, of outcomes or of steps, and language models that are asked yes or no.

Each runs on an `LLM` of its own, which is not the one whose outputs it scores, and has one call at a time, with the candidates
of all groups that have come meanwhile. What its engine computes for a score counts as the group's verifier tokens.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from expertwire.engine.frontend.chat import Chat
from expertwire.engine.frontend.tokenizer import Tokenizer
from expertwire.llm import LLM
from expertwire.scheduler.sampling_params import MAX_LOGPROBS, SamplingParams
from expertwire.strategies.verifiers import Candidate, CountedScore, VerifierError

QUESTION = "{prompt}\n\nA proposed answer:\n\n{text}\n\nIs the proposed answer correct? Reply with Yes or No."


@dataclass(frozen=True, kw_only=True)
class RewardModel:
    """Scores outputs by a reward model: a whole output, or its last step.

    The score is the reward where the model has one label, and else the probability of the last label, as Qwen2.5-Math-PRM's
    "good step". An output is scored again when it is longer; what was computed of it is found in the model's prefix cache.

    Args:
        llm: an engine of a reward model or classifier with a chat template.
        system: message of the system before the prompt; None: there is none.
        step_text: text between the steps of an output, "\\n\\n" for Qwen2.5-Math-PRM; None: the output is scored as a whole.
        step_token: token that the model expects after each step, "<extra_0>" for Qwen2.5-Math-PRM; goes with `step_text`.

    Raises:
        ValueError: names the field and the values it allows.
    """

    llm: LLM
    system: str | None = None
    step_text: str | None = None
    step_token: str | None = None
    max_calls: ClassVar[int] = 1
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def __post_init__(self) -> None:
        info = self.llm.model_info
        if not info.num_labels:
            raise ValueError(f"llm must be a reward model or classifier, got {info.architecture}, which generates text")
        _tokenizer(self.llm)
        if (self.step_text is None) != (self.step_token is None) or self.step_text == "" or self.step_token == "":
            raise ValueError(
                f"step_text and step_token must both be None or texts, got {self.step_text!r} and {self.step_token!r}"
            )
        if self.step_token is not None and len(self._encode(self.step_token)) != 1:
            raise ValueError(f"step_token must be one token of the reward model, got {self.step_token!r}")

    def __call__(self, candidates: Sequence[Candidate], /) -> list[float]:
        """Return the candidates' scores."""
        prompts = [self.prompt(candidate) for candidate in candidates]
        with self._lock:
            outputs = self.llm.reward_outputs(prompts, use_tqdm=False)
        return [CountedScore(_reward(output.scores), output.num_computed_tokens) for output in outputs]

    def prompt(self, candidate: Candidate) -> list[int]:
        """Return the tokens that the model is given; the score is that of the last one.

        Raises:
            VerifierError: the candidate has no text, or no step.
        """
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        chat = [
            *system,
            {"role": "user", "content": candidate.prompt},
            {"role": "assistant", "content": candidate.text},
        ]
        if self.step_text is None or self.step_token is None:
            return _encode_chat(self.llm, chat, reply=False)
        steps = [step for step in candidate.text.split(self.step_text) if step.strip()]
        if not steps:
            raise VerifierError("the output has no step yet")
        chat[-1]["content"] = "".join(step + self.step_token for step in steps)
        tokens = _encode_chat(self.llm, chat, reply=False)
        [mark] = self._encode(self.step_token)
        if mark not in tokens:
            raise VerifierError(f"the chat template of the reward model leaves out {self.step_token!r}")
        return tokens[: len(tokens) - tokens[::-1].index(mark)]

    def _encode(self, text: str) -> list[int]:
        return _tokenizer(self.llm).encode(text, add_special_tokens=False)


@dataclass(frozen=True, kw_only=True)
class YesNo:
    """Scores outputs by the probability with which a language model answers "Yes" and not "No" to a question about them.

    Args:
        llm: an engine of a language model with a chat template.
        question: text with "{prompt}" and "{text}", which stand for the prompt and the output.
        yes, no: the two answers in lower case; tokens count whose text is one of them, without spaces and in any case.

    Raises:
        ValueError: names the field and the values it allows.
    """

    llm: LLM
    question: str = QUESTION
    yes: str = "yes"
    no: str = "no"
    max_calls: ClassVar[int] = 1
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.llm.model_info.num_labels:
            raise ValueError(f"llm must be a language model, got {self.llm.model_info.architecture}: use RewardModel")
        _tokenizer(self.llm)
        if "{prompt}" not in self.question or "{text}" not in self.question:
            raise ValueError(f"question must have {{prompt}} and {{text}}, got {self.question!r:.100}")
        if not self.yes or not self.no or self.yes == self.no:
            raise ValueError(f"yes and no must be two different words, got {self.yes!r} and {self.no!r}")

    def __call__(self, candidates: Sequence[Candidate], /) -> list[float]:
        """Return the candidates' scores, in [0, 1].

        Raises:
            VerifierError: neither word is among the most probable tokens.
        """
        params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=MAX_LOGPROBS, ignore_eos=True)
        prompts = [self.prompt(candidate) for candidate in candidates]
        with self._lock:
            outputs = self.llm.generate(prompts, params, use_tqdm=False)
        num_tokens = [len(output.prompt_token_ids) - output.num_cached_tokens for output in outputs]
        scores: list[float] = []
        for output, num in zip(outputs, num_tokens, strict=True):
            [position] = output.outputs[0].logprobs or [{}]
            mass = {self.yes: 0.0, self.no: 0.0}
            for token in position.values():
                word = (token.decoded_token or "").strip().lower()
                if word in mass:
                    mass[word] += math.exp(token.logprob)
            if not sum(mass.values()):
                raise VerifierError(
                    f"neither {self.yes!r} nor {self.no!r} is among the {len(position)} most probable tokens",
                    num_tokens,
                )
            scores.append(CountedScore(mass[self.yes] / sum(mass.values()), num))
        return scores

    def prompt(self, candidate: Candidate) -> list[int]:
        """Return the tokens of the question about a candidate."""
        # Not `format`: the texts may have braces.
        parts = self.question.split("{text}")
        text = candidate.text.join(part.replace("{prompt}", candidate.prompt) for part in parts)
        return _encode_chat(self.llm, [{"role": "user", "content": text}], reply=True)


def _tokenizer(llm: LLM) -> Tokenizer:
    if llm.tokenizer is None:
        raise ValueError("llm must have a tokenizer, got one without")
    return llm.tokenizer


def _encode_chat(llm: LLM, messages: list[dict[str, str]], *, reply: bool) -> list[int]:
    return _tokenizer(llm).encode_chat(Chat(messages=messages, add_generation_prompt=reply))


def _reward(scores: np.ndarray) -> float:
    if len(scores) == 1:
        return float(scores[0])
    weights = np.exp(scores.astype(np.float64) - scores.max())
    return float(weights[-1] / weights.sum())
