"""`expertwire calibrate strategies`: a table for `compute_optimal`, from how strategies do on a user's prompts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertwire.deploy.replay import shown
from expertwire.deploy.runtime import open_frontend
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.frontend.api import EngineFailed, RequestOptions
from expertwire.engine.frontend.chat import Chat
from expertwire.engine.frontend.frontend import Frontend
from expertwire.engine.frontend.group_run import GroupRun
from expertwire.engine.frontend.groups import Groups
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.strategies.base import Needs, Strategy
from expertwire.strategies.calibrate import Calibration, Trial, calibrate
from expertwire.strategies.checks import require_integer, require_number
from expertwire.strategies.compute_optimal import Bin, ComputeOptimal
from expertwire.strategies.verifiers import Candidate, Verifier

_POLL_S = 0.2  # longest wait for an interrupt to take effect
_MAX_OPEN = 64  # groups at the same time


@dataclass(frozen=True, kw_only=True)
class Study:
    """The strategies that are compared, and how.

    Every one of them runs as `compute_optimal` would run it, behind the same probe: its tokens are those that it will take.

    Args:
        candidates: strategies that a row of the table may have, by name.
        baseline: name of the one whose accuracy the table has to reach.
        verifier: scores results, from 0 for wrong to 1 for right.
        probe, greedy_probe, signal: as for `ComputeOptimal`.
        num_bins, tolerance, seed: as for `calibrate`; the seed is also that of the first prompt's outputs.

    Raises:
        ValueError: names the field and the values it allows.
    """

    candidates: Mapping[str, Strategy]
    baseline: str
    verifier: Verifier
    probe: int = 4
    greedy_probe: bool = False
    signal: str = "agreement"
    num_bins: int = 3
    tolerance: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.baseline not in self.candidates:
            raise ValueError(f"baseline must be one of {', '.join(self.candidates)}, got {self.baseline!r}")
        require_integer("num_bins", self.num_bins, minimum=1)
        require_number("tolerance", self.tolerance, minimum=0, maximum=1)
        require_integer("seed", self.seed, minimum=0)
        for strategy in self.candidates.values():
            self.compute_optimal([Bin(strategy=strategy)])

    def compute_optimal(self, rows: Sequence[Bin]) -> ComputeOptimal:
        """Return the strategy that has these rows as its table."""
        needs = [strategy.needs for strategy in self.candidates.values()]
        return ComputeOptimal(
            table=tuple(rows),
            probe=self.probe,
            greedy_probe=self.greedy_probe,
            signal=self.signal,
            answer=next((each.answer for each in needs if each.answer is not None), None),
            verifier=self._serving_verifier(needs, rows),
        )

    def _serving_verifier(self, needs: Sequence[Needs], rows: Sequence[Bin]) -> Verifier | None:
        """Return the verifier that is needed while requests are served: none where only the calibration has one."""
        own = next((each.verifier for each in needs if each.verifier is not None), None)
        if self.signal == "verifier":
            return own or self.verifier
        return own if any(row.strategy.needs.verifier is not None for row in rows) else None


@dataclass(frozen=True)
class _Prompt:
    """A prompt of the file: its id, and what the frontend encodes."""

    id: str
    content: str | Chat


def read_prompts(path: str | Path) -> list[_Prompt]:
    """Return the prompts of a file: a line for each, {"prompt": text} or {"messages": [...]}, with an "id" or without.

    Raises:
        ValueError: the file cannot be read, or a line is no prompt; names it.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the file of prompts {path} cannot be read: {error}") from error
    prompts = [_prompt(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if len({prompt.id for prompt in prompts}) < len(prompts):
        raise ValueError(f"the file of prompts {path} must give each id once")
    if not prompts:
        raise ValueError(f"the file of prompts {path} must have at least one prompt; it is empty")
    return prompts


def _prompt(number: int, line: str) -> _Prompt:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"prompts, line {number}: no JSON: {error}") from error
    if not isinstance(fields, dict) or ("prompt" in fields) == ("messages" in fields):
        raise ValueError(f'prompts, line {number}: must be an object with "prompt" or "messages", got {line!r:.200}')
    prompt = fields.get("prompt")
    if "prompt" in fields and not isinstance(prompt, str):
        raise ValueError(f"prompts, line {number}: prompt must be a text, got {prompt!r:.200}")
    content = prompt if isinstance(prompt, str) else Chat(messages=fields["messages"])
    return _Prompt(str(fields.get("id", number)), content)


def run(
    config: EngineConfig,
    prompts: Sequence[_Prompt],
    params_of: Callable[[Frontend], SamplingParams],
    study: Study,
    log: Callable[[str], object],
) -> tuple[ComputeOptimal, Calibration]:
    """Run every candidate on every prompt, and return the table with its report.

    Args:
        config: of the engine.
        prompts: those of `read_prompts`.
        params_of: returns the sampling parameters for the model.
        study: what is compared.
        log: writes a line about progress.

    Raises:
        ValueError: names the field and the values it allows, or says which prompt has failed.
        EngineFailed: the engine has failed.
    """
    with open_frontend(config) as frontend, contextlib.closing(Groups(frontend)) as groups:
        trials = list(_trials(groups, prompts, params_of(frontend), study, log))
    found = calibrate(
        trials, baseline=study.baseline, num_bins=study.num_bins, tolerance=study.tolerance, seed=study.seed
    )
    rows = [
        Bin(
            strategy=study.candidates[choice.strategy],
            least=choice.least,
            name=f"{number} of {len(found.table)}",
            accuracy=choice.accuracy.value if choice.num_prompts else None,
            tokens=choice.tokens if choice.num_prompts else None,
        )
        for number, choice in enumerate(found.table, 1)
    ]
    return study.compute_optimal(rows), found


def _trials(
    groups: Groups,
    prompts: Sequence[_Prompt],
    params: SamplingParams,
    study: Study,
    log: Callable[[str], object],
) -> Iterator[Trial]:
    frontend = groups.frontend
    strategies = {name: study.compute_optimal([Bin(strategy=each)]) for name, each in study.candidates.items()}
    waiting = deque((number, name) for number in range(len(prompts)) for name in strategies)
    total, num_done, running = len(waiting), 0, dict[GroupRun, tuple[int, str]]()
    while waiting or running:
        while waiting and len(running) < _MAX_OPEN:
            number, name = waiting.popleft()
            content = prompts[number].content
            seeded = dataclasses.replace(params, seed=study.seed + number)  # one probe for all strategies of a prompt
            tokens = frontend.encode(content, seeded)
            text = content if isinstance(content, str) else None
            run = groups.start(tokens, seeded, RequestOptions(), strategies[name], prompt=text)
            running[run] = number, name
        groups.poll(_POLL_S)
        ended = [run for run in running if run.done]
        for run in ended:
            if run.error is not None:
                which = f"prompt {prompts[running[run][0]].id}, {running[run][1]}"
                raise (EngineFailed if frontend.failure else ValueError)(f"{which}: {run.error.message}")
        for run, accuracy in zip(ended, _graded(ended, study.verifier), strict=True):
            number, name = running.pop(run)
            counts = run.token_counts()
            yield Trial(
                prompt=prompts[number].id,
                signal=strategies[name].signal_of(run.view()),
                strategy=name,
                accuracy=accuracy,
                tokens=counts.kept + counts.pruned + counts.verifier,
            )
        if ended:
            num_done += len(ended)
            log(f"{num_done} of {total} groups\n")


def _graded(runs: Sequence[GroupRun], verifier: Verifier) -> list[float]:
    """Return the verifier's score of each result; 0 where nothing was selected."""
    accuracy, candidates = dict.fromkeys(runs, 0.0), {}
    for run in runs:
        assert run.selection is not None, f"group {run.id} has ended without a result or an error"
        for index in run.selection.branches[:1]:
            branch = run.branches[index]
            candidates[run] = Candidate(
                prompt=run.prompt_text(),
                text=branch.text,
                prompt_token_ids=run.tokens.tolist(),
                token_ids=branch.token_ids,
                complete=run.fate(branch) == "kept",
            )
    if candidates:
        scores: list[Any] = list(verifier(list(candidates.values())))
        if len(scores) != len(candidates):
            raise ValueError(f"the verifier must return {len(candidates)} scores, got {len(scores)}")
        for run, score in zip(candidates, scores, strict=True):
            require_number("the verifier's score", score, minimum=0, maximum=1)
            accuracy[run] = float(score)
    return list(accuracy.values())


def report(found: Calibration, study: Study) -> Iterator[str]:
    """Yield the lines that say what was chosen, and how it did on the other fold."""
    for number, choice in enumerate(found.table, 1):
        bound = "the rest" if choice.least is None else f"{study.signal} >= {choice.least:.4g}"
        yield f"bin {number}, {bound}: {choice.strategy}"
        yield f"  {choice.num_prompts} prompts, accuracy {shown(choice.accuracy)}, {choice.tokens:.0f} tokens"
    yield f"on {found.num_prompts} other prompts than it was chosen on:"
    yield f"  accuracy {shown(found.accuracy)}; of the baseline {shown(found.baseline_accuracy)}"
    yield f"  difference in accuracy {shown(found.accuracy_gap)}"
    yield f"  tokens {found.tokens:.0f}; of the baseline {found.baseline_tokens:.0f}; ratio {shown(found.token_ratio)}"
