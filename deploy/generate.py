"""`expertwire generate`: outputs of prompts on standard output, without a server."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from expertwire.deploy.runtime import open_frontend
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.frontend.api import EngineFailed, RequestError, RequestOptions
from expertwire.engine.frontend.frontend import Frontend
from expertwire.engine.frontend.group_run import GroupRun
from expertwire.engine.frontend.groups import Groups
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.strategies.base import Strategy

_POLL_S = 0.2  # longest wait for an interrupt to take effect
Write = Callable[[str], object]


def generate(
    config: EngineConfig,
    prompts: Sequence[str],
    params_of: Callable[[Frontend], SamplingParams],
    strategy: Strategy | None,
    *,
    out: Write,
    log: Write,
) -> None:
    """Generate outputs for prompts.

    Args:
        config: of the engine.
        prompts: texts.
        params_of: returns the sampling parameters for the model.
        strategy: of test-time compute for each prompt; None: none.
        out: writes outputs: a single one token by token, several in order with headings.
        log: writes a line about each prompt's group.

    Raises:
        ValueError: names the field and the values it allows, or says which prompt has failed.
        EngineFailed: the engine has failed.
    """
    with open_frontend(config) as frontend:
        params = params_of(frontend)
        if strategy is None:
            _generate(frontend, prompts, params, out)
        else:
            with contextlib.closing(Groups(frontend)) as groups:
                _generate_by_strategy(groups, prompts, params, strategy, out, log)


def _generate(frontend: Frontend, prompts: Sequence[str], params: SamplingParams, out: Write) -> None:
    is_single = len(prompts) == params.n == 1
    ids = [frontend.submit(frontend.encode(prompt, params), params) for prompt in prompts]
    texts = {(request_id, branch): "" for request_id in ids for branch in range(params.n)}
    while frontend.num_open:
        for update in frontend.poll(_POLL_S):
            _raise_for(frontend, update.error)
            texts[update.request_id, update.branch] += update.text
            if is_single:
                out(update.text)
    if is_single:
        out("\n")
        return
    for (request_id, branch), text in texts.items():
        output = f", output {branch + 1}" if params.n > 1 else ""
        out(f"==> prompt {ids.index(request_id) + 1}{output} <==\n{text}\n")


def _generate_by_strategy(
    groups: Groups, prompts: Sequence[str], params: SamplingParams, strategy: Strategy, out: Write, log: Write
) -> None:
    frontend = groups.frontend
    runs = [
        groups.start(frontend.encode(prompt, params), params, RequestOptions(), strategy, prompt=prompt)
        for prompt in prompts
    ]
    while not all(run.done for run in runs):
        groups.poll(_POLL_S)
        for run in runs:
            _raise_for(frontend, run.error)
    for number, run in enumerate(runs, 1):
        assert run.selection is not None, f"prompt {number} has no result"
        for branch in run.selection.branches:
            heading = f"==> prompt {number}, branch {branch} <==\n"
            out(f"{'' if len(runs) == len(run.selection.branches) == 1 else heading}{run.branches[branch].text}\n")
        log(f"prompt {number}: {_summary(run)}\n")


def _summary(run: GroupRun) -> str:
    assert run.selection is not None, run.error
    kept = sum(run.fate(branch) == "kept" for branch in run.branches)
    tokens = run.token_counts()
    answer = "" if run.selection.answer is None else f"answer {run.selection.answer!r}, "
    return (
        f"{answer}{run.selection.reason}; {kept} of {len(run.branches)} branches kept; tokens: {tokens.kept} kept, "
        f"{tokens.pruned} pruned, {tokens.verifier} by verifiers"
    )


def _raise_for(frontend: Frontend, error: RequestError | None) -> None:
    if error is not None:
        raise (EngineFailed if frontend.failure else ValueError)(error.message)
