"""Our scheduler beside another engine's, under one load (see `cost`), in one run.

The peer is nano-vllm (GeeeekExplorer/nano-vllm), whose scheduler and block manager are Python, too.
A checkout is given by path and driven as it is; only its package's `__init__` and its
configuration, which import a model and a tokenizer, are stood in for.
"""

from __future__ import annotations

import importlib
import pickle
import statistics
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from expertwire.bench.scheduler.cost import FULL, WARM_UP, Asked, Ours, Stopwatch
from expertwire.bench.scheduler.simulation import EOS


class Contestant(Protocol):
    """A scheduler under the load."""

    watch: Stopwatch
    scheduled: list[int]  # requests in each step

    def clear(self) -> None:
        """Forget the measurements."""
        ...

    def fill(self) -> None:
        """Run until all slots are taken, and some steps more."""
        ...

    def step(self) -> None:
        """Replace the requests that have ended, and run one step."""
        ...


class Peer:
    """nano-vllm's scheduler. Its plan is the list of sequences, which it pickles for further processes of a model."""

    def __init__(
        self, classes: tuple[Any, Any, Any], running: int, block_size: int, max_num_batched_tokens: int
    ) -> None:
        scheduler, self._sequence, self._params = classes
        self._sequence.block_size = block_size
        config = types.SimpleNamespace(
            max_num_seqs=running,
            max_num_batched_tokens=max_num_batched_tokens,
            eos=EOS,
            kvcache_block_size=block_size,
            num_kvcache_blocks=max(40 * 16 // block_size, 4) * running,
        )
        self._block_size = block_size
        self._scheduler = scheduler(config)
        self._asked = Asked(0)
        self._missing = running
        self.clear()

    def clear(self) -> None:
        self.watch = Stopwatch()
        self.scheduled: list[int] = []

    def fill(self) -> None:
        running = self._missing
        self.step(running_already=True)
        while len(self._scheduler.running) < FULL * running:
            self.step()
        for _ in range(WARM_UP):
            self.step()
        self.clear()

    def step(self, *, running_already: bool = False) -> None:
        self._sequence.block_size = self._block_size  # it is the class's
        drawn = [self._asked.draw(running_already=running_already) for _ in range(self._missing)]
        given = [(prompt.tolist(), self._params(max_tokens=n, ignore_eos=True)) for prompt, n in drawn]
        watch = self.watch
        watch.begin()
        watch.start()
        for prompt, params in given:
            self._scheduler.add(self._sequence(prompt, params))
        watch.stop("arrivals")
        watch.start()
        sequences, is_prefill = self._scheduler.schedule()
        watch.stop("plan")
        watch.start()
        pickle.dumps(["run", sequences, is_prefill])
        watch.stop("serialise")
        tokens = [1 + i for i in range(len(sequences))]
        watch.start()
        self._scheduler.postprocess(sequences, tokens, is_prefill)
        watch.stop("commit")
        self.scheduled.append(len(sequences))
        self._missing = sum(sequence.is_finished for sequence in sequences)


def compare(
    path: Path, *, sizes: Sequence[int] = (256, 1024), steps: int = 200, rounds: int = 5, overlap: bool = True
) -> dict[str, Any]:
    """Return µs of processor time per scheduled request, ours and the peer's; medians of rounds.

    Both have one rank of `sizes` requests and 16,384 tokens a step. The peer computes prompts in
    steps of their own, in which nothing decodes; all its steps count. It runs with blocks of 256
    tokens, its own size, and of 16, ours.

    Raises:
        ValueError: there is no nano-vllm at `path`.
    """
    budget = 16384
    classes = _load_peer(path)
    rows = []
    for size in sizes:
        contestants: dict[str, Contestant] = {
            "ours, blocks of 16": Ours(1, size, max_num_batched_tokens=budget, overlap=overlap),
            "peer, blocks of 256": Peer(classes, size, 256, budget),
            "peer, blocks of 16": Peer(classes, size, 16, budget),
        }
        for contestant in contestants.values():
            contestant.fill()
        figures: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
        for _ in range(rounds):
            for name, contestant in contestants.items():
                figures[name].append(_per_request(contestant, steps))
        for name, pairs in figures.items():
            without, serialise = (statistics.median(values) for values in zip(*pairs, strict=True))
            rows.append({"who": name, "running": size, "us": without, "serialise_us": serialise, "rounds": pairs})
    return {"steps": steps, "rounds": rounds, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """Return a report as text."""
    lines = [
        f"µs of processor time per scheduled request; medians of {result['rounds']} rounds of {result['steps']} steps, in turns",
        "",
        f"{'':<22}{'running':>10}{'scheduling':>12}{'serialise':>12}",
    ]
    for row in result["rows"]:
        lines.append(f"{row['who']:<22}{row['running']:>10}{row['us']:>12.2f}{row['serialise_us']:>12.2f}")
    return "\n".join(lines)


def _per_request(contestant: Contestant, steps: int) -> tuple[float, float]:
    """Return µs per scheduled request without serialising, and of serialising."""
    contestant.clear()
    for _ in range(steps):
        contestant.step()
    serialise = float(contestant.watch.part("serialise").sum())
    scheduled = sum(contestant.scheduled)
    return (float(contestant.watch.total().sum()) - serialise) / scheduled, serialise / scheduled


def _load_peer(path: Path) -> tuple[Any, Any, Any]:
    """Return the peer's Scheduler, Sequence and SamplingParams."""
    root = path / "nanovllm"
    if not (root / "engine" / "scheduler.py").is_file():
        raise ValueError(f"--peer: {path} is no checkout of nano-vllm: there is no {root / 'engine' / 'scheduler.py'}")
    package, config = types.ModuleType("nanovllm"), types.ModuleType("nanovllm.config")
    package.__path__ = [str(root)]
    config.Config = types.SimpleNamespace  # type: ignore[attr-defined]
    for name in [name for name in sys.modules if name.partition(".")[0] == "nanovllm"]:
        del sys.modules[name]  # of another checkout
    sys.modules.update({"nanovllm": package, "nanovllm.config": config})
    names = ("engine.scheduler", "engine.sequence", "sampling_params")
    scheduler, sequence, params = (importlib.import_module(f"nanovllm.{name}") for name in names)
    return scheduler.Scheduler, sequence.Sequence, params.SamplingParams
