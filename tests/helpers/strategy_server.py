"""A server without a model in a thread of the test's process, whose groups a test looks at from both ends."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import time
from pathlib import Path

import expertwire
from expertwire.deploy.grpc.catalog import Catalog
from expertwire.deploy.grpc.client import ServerVerifier
from expertwire.deploy.grpc.server import Server
from expertwire.deploy.runtime import make_launcher, open_tokenizer, special_ids
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.engine import Engine
from expertwire.engine.frontend.frontend import Frontend
from expertwire.strategies import (
    BestOfN,
    Bin,
    Budget,
    ComputeOptimal,
    MajorityVote,
    Needs,
    RegexAnswer,
    Selection,
    WholeText,
)
from expertwire.strategies.base import Start, Status
from expertwire.strategies.registry import STRATEGIES

DEMO = Path(expertwire.__file__).with_name("demo_model")
OPTIONS = {"load_format": "mock", "max_num_seqs": 8, "mock_step_time_s": 0.001}
PROMPT = [10, 11, 12]
FREE = {"max_tokens": 12, "ignore_eos": True}
ENDLESS = {"max_tokens": 1900, "ignore_eos": True}


def most_tokens_even(candidates):
    """As a verifier: how many tokens are even numbers."""
    return [sum(token % 2 == 0 for token in candidate.token_ids) for candidate in candidates]


class Hanging:
    """A verifier that returns when it is let go."""

    def __init__(self):
        self.is_called, self.may_return = threading.Event(), threading.Event()

    def __call__(self, candidates):
        self.is_called.set()
        self.may_return.wait(30)
        return [1.0] * len(candidates)


def failing(candidates):
    raise RuntimeError("out of order")


@dataclasses.dataclass(frozen=True)
class Twice:
    """A strategy of the server's own: the longer of two outputs."""

    label: str = "own"

    @property
    def needs(self):
        return Needs()

    def decide(self, group):
        return [] if group.branches else [Start(2, self.label)]

    def select(self, group):
        best = max(group.branches, key=lambda branch: (len(branch.token_ids), -branch.index))
        return Selection(branches=(best.index,), reason=f"the longest of {self.label}")


@dataclasses.dataclass(frozen=True)
class Greedy:
    """A strategy of the server's own that wants too many branches: at once, or in turns."""

    at_once: int

    @property
    def needs(self):
        return Needs()

    def decide(self, group):
        return [Start(self.at_once)] if all(each.status is Status.FINISHED for each in group.branches) else []

    def select(self, group):
        return Selection(branches=(0,), reason="never")


HANGING = Hanging()
VERIFIERS = {"even": most_tokens_even, "hanging": HANGING, "failing": failing}
CATALOG = Catalog(strategies={**STRATEGIES, "twice": Twice, "greedy": Greedy}, verifiers=VERIFIERS)


@contextlib.contextmanager
def serving():
    """An engine and a server in a thread of this process: its address, frontend, loop and stop event."""
    config = EngineConfig(model=str(DEMO), launcher="local", threads_per_rank=1, **OPTIONS)
    tokenizer = open_tokenizer(config)
    ready, running = threading.Event(), {}
    HANGING.may_return.clear()  # another file's server has let it go
    with Engine(config, make_launcher(config), *special_ids(tokenizer)) as engine:

        async def main():
            stop, server = asyncio.Event(), Server("127.0.0.1", 0)
            with contextlib.closing(Frontend(engine.connect(), tokenizer)) as frontend:
                running.update(
                    address=f"127.0.0.1:{server.port}", frontend=frontend, loop=asyncio.get_running_loop(), stop=stop
                )
                await server.serve(frontend, stop=stop, drain_timeout_s=10, catalog=CATALOG, on_ready=ready.set)

        thread = threading.Thread(target=asyncio.run, args=(main(),))
        thread.start()
        try:
            assert ready.wait(60)
            yield running
        finally:
            HANGING.may_return.set()
            with contextlib.suppress(RuntimeError):  # a test has stopped it, and the loop is closed
                running["loop"].call_soon_threadsafe(running["stop"].set)
            thread.join(30)
            assert not thread.is_alive()


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def outputs_of(generation):
    """The tokens, the text and the finish reason of each branch that came."""
    found = {}
    for chunk in generation:
        tokens, text, _ = found.get(chunk.branch, ([], "", None))
        found[chunk.branch] = (tokens + chunk.token_ids, text + chunk.text, chunk.finish_reason)
    return found


def idle(client):
    """True if nothing runs and no block is in use."""
    stats = client.stats()
    return not stats["num_running"] and not stats["num_waiting"] and not any(stats["blocks_used"]["full"])


def counted(client):
    """Sampled tokens as the groups count them, and as the engine does."""
    client.stats()  # counts that are on their way come before its answer
    stats = client.stats()
    groups = stats["groups"]
    parts = [groups.get(f"tokens_{fate}", 0) for fate in ("kept", "pruned", "late")]
    return sum(parts) + stats["tokens_dropped"], stats["tokens_sampled"]


STRATEGIES_TRIED = {
    "best": BestOfN(5, verifier=most_tokens_even),
    # Without what depends on the messages: how many branches have finished when the group ends early.
    "votes": MajorityVote(6, RegexAnswer("([a-z])"), stop_when_decided=False, budget=Budget(branches=5)),
    "table": ComputeOptimal(
        (
            Bin(strategy=MajorityVote(4, WholeText(), stop_when_decided=False), least=0.9, name="easy"),
            Bin(strategy=BestOfN(3, verifier=most_tokens_even)),
        ),
        probe=2,
        answer=WholeText(),
        verifier=most_tokens_even,
    ),
}


def named(strategy):
    """The strategy with the verifier's name instead of the verifier."""
    name = ServerVerifier("even")
    if isinstance(strategy, ComputeOptimal):
        rows = tuple(
            dataclasses.replace(row, strategy=dataclasses.replace(row.strategy, verifier=name))
            if getattr(row.strategy, "verifier", None)
            else row
            for row in strategy.table
        )
        return dataclasses.replace(strategy, table=rows, verifier=name)
    return dataclasses.replace(strategy, verifier=name) if getattr(strategy, "verifier", None) else strategy
