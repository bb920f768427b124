"""`expertwire generate`: continues prompts with an engine of its own, without a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from expertwire.deploy.runtime import open_frontend
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.frontend.api import EngineFailed
from expertwire.scheduler.sampling_params import SamplingParams

_POLL_S = 0.2  # how long an interrupt may wait


def generate(
    config: EngineConfig, prompts: Sequence[str], params: SamplingParams, *, write: Callable[[str], None]
) -> None:
    """Write the outputs of all prompts: a single one as it comes, several in order, with headings.

    Raises:
        ValueError: an option, the model or a prompt is not usable.
        EngineFailed: the engine could not start, or has failed.
    """
    alone = len(prompts) == params.n == 1
    with open_frontend(config) as frontend:
        ids = [frontend.submit(frontend.encode(prompt, params), params) for prompt in prompts]
        texts = {(request_id, branch): "" for request_id in ids for branch in range(params.n)}
        while frontend.num_open:
            for update in frontend.poll(_POLL_S):
                if update.error is not None:
                    raise (EngineFailed if frontend.failure else ValueError)(update.error.message)
                texts[update.request_id, update.branch] += update.text
                if alone:
                    write(update.text)
    if alone:
        write("\n")
        return
    for (request_id, branch), text in texts.items():
        output = f", output {branch + 1}" if params.n > 1 else ""
        write(f"==> prompt {ids.index(request_id) + 1}{output} <==\n{text}\n")
