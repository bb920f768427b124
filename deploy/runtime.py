"""Start an engine and its frontend, for the commands and the offline API."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from expertwire.deploy import hub
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.config.thinking import ThinkingIds
from expertwire.engine.engine import Engine
from expertwire.engine.frontend.frontend import Frontend
from expertwire.engine.frontend.tokenizer import Tokenizer
from expertwire.engine.launcher import WORKER, Launcher, LocalLauncher
from expertwire.engine.mock_worker import MOCK_WORKER


def with_model_folder(config: EngineConfig) -> EngineConfig:
    """Return the options with the folder of the model, which is downloaded if it is a name of the Hugging Face hub.

    Raises:
        ValueError: there is no such model, or it cannot be downloaded.
    """
    if not hub.is_name(config.model):
        if config.revision is not None:
            raise ValueError(f"revision has no effect on a folder, got {config.revision!r} for {config.model}")
        return config
    folder = hub.model_folder(config.model, config.revision, weights=config.load_format == "auto")
    name = config.served_model_name or config.model.rpartition("/")[2]
    return dataclasses.replace(config, model=folder, revision=None, served_model_name=name)


def open_tokenizer(config: EngineConfig) -> Tokenizer | None:
    """Return the model's tokenizer; None for a folder without one whose weights are not read.

    Raises:
        ValueError: it is missing or malformed.
    """
    if config.load_format != "auto" and not (Path(config.model) / "tokenizer.json").exists():
        return None
    return Tokenizer.open(config.model)


def special_ids(tokenizer: Tokenizer | None) -> tuple[tuple[int, ...], ThinkingIds | None]:
    """Return the tokens that end an answer in the model's output format, and those of reasoning; none without a tokenizer."""
    return ((), None) if tokenizer is None else (tokenizer.end_of_turn_ids(), tokenizer.thinking_ids)


def make_launcher(config: EngineConfig) -> Launcher:
    """Return the launcher that `config` chooses."""
    worker = MOCK_WORKER if config.load_format == "mock" else WORKER
    if config.resolved_launcher() == "local":
        return LocalLauncher(worker)
    from expertwire.deploy.ray.launcher import RayLauncher

    return RayLauncher(address=config.ray_address, worker=worker)


@contextlib.contextmanager
def open_frontend(config: EngineConfig) -> Iterator[Frontend]:
    """Yield a frontend with its own engine, which ends with the block; seeds follow from the engine's.

    Raises:
        ValueError: an option or the checkpoint is not usable.
        EngineFailed: the engine could not start.
    """
    config = with_model_folder(config)
    tokenizer = open_tokenizer(config)
    with (
        Engine(config, make_launcher(config), *special_ids(tokenizer)) as engine,
        contextlib.closing(Frontend(engine.connect(), tokenizer, deterministic_seeds=True)) as frontend,
    ):
        yield frontend
