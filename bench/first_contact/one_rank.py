"""One rank of an engine in this process, without controller and frontend: its scheduler, its model and its steps.

Every call into the engine that the benches and tests of a GPU need is here, and nowhere else. T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from expertwire.comm.all_to_all.base import AllToAll, AllToAllSpec
from expertwire.comm.all_to_all.local import LocalAllToAll
from expertwire.comm.all_to_all.reference import ReferenceAllToAll
from expertwire.comm.group import SoloGroup
from expertwire.engine.layers.step import RankContext
from expertwire.engine.loader.checkpoint import Checkpoint
from expertwire.engine.loader.weights import load_model
from expertwire.engine.models.registry import read_model_config
from expertwire.engine.runner import cuda_graphs
from expertwire.engine.runner.cuda_graphs import Capture, Captured
from expertwire.engine.runner.model_runner import ModelRunner
from expertwire.kernels import registry
from expertwire.kernels.registry import Ops
from expertwire.moe.eplb.placement import Placement, place
from expertwire.scheduler.config import SchedulerConfig
from expertwire.scheduler.outputs import StepOutputs
from expertwire.scheduler.plan import StepPlan, StepResult
from expertwire.scheduler.request import Request
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.scheduler.scheduler import Scheduler

BLOCK_SIZE = 16
CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True, kw_only=True)
class Target:
    """The device that a rank computes on, and its kernels.

    Args:
        device: "cpu" or "cuda".
        ops: for it; Triton's on a CPU are interpreted.
        capture: captures steps; None: none is.
    """

    device: str
    ops: Ops
    capture: Capture | None = None

    @classmethod
    def cpu(cls) -> Target:
        """Return the CPU engine, with which others are compared."""
        return cls(device="cpu", ops=registry.cpu())

    @classmethod
    def gpu(cls, device: str, *, graphs: bool = True, fast: bool = False) -> Target:
        """Return the GPU engine; on "cpu" its kernels are interpreted, and a captured step is run again instead of replayed."""
        if device == "cpu":
            from expertwire.bench.kernels import interpreter
            from expertwire.kernels.gpu.device import describe

            interpreter.prepare()
            return cls(
                device="cpu", ops=registry.triton(describe("cpu"), fast=fast), capture=_again if graphs else None
            )
        device = f"{device}:{torch.cuda.current_device()}"
        return cls(
            device=device,
            ops=registry.choose(device, fast=fast),
            capture=cuda_graphs.cuda(SoloGroup().barrier) if graphs else None,
        )


def _again(work: Callable[[], Tensor]) -> Captured:
    out = work()

    def replay() -> None:
        out.copy_(work())

    return Captured(replay, out)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Options of a rank, see `EngineConfig`. `cache_tokens`: capacity of the cache; None: as many as requests can have."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    cache_tokens: int | None = None


@dataclass
class Step:
    """A step that was run: tokens and sequences in it, and what it took.

    Attributes:
        host_us: to plan and to launch it.
        device_us: its `forward_us`; 0 where the device has no clock.
        done_s: when its result was there, on `time.perf_counter`.
    """

    tokens: int
    sequences: int
    host_us: float
    device_us: int
    done_s: float


@dataclass
class Answers:
    """The answers by request key: tokens, their log-probabilities, how much likelier the most likely token was than the
    next (with `logprobs` of 2 or more), and the prompt's log-probabilities by position."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    margins: dict[int, list[float]] = field(default_factory=dict)
    prompts: dict[int, dict[int, float]] = field(default_factory=dict)

    def add(self, outputs: StepOutputs) -> None:
        for i, key in enumerate(outputs.key_O.tolist()):
            self.tokens.setdefault(key, []).append(int(outputs.token_O[i]))
            self.logprobs.setdefault(key, []).append(float(outputs.logprob_O[i]))
            top = outputs.top_logprobs[slice(*outputs.top_offsets_O1[i : i + 2])]
            if len(top) > 1:
                self.margins.setdefault(key, []).append(float(top[0] - top[1]))
        rows = zip(
            outputs.prompt_key_I.tolist(),
            outputs.prompt_position_I.tolist(),
            outputs.prompt_logprob_I.tolist(),
            strict=True,
        )
        for key, position, logprob in rows:
            self.prompts.setdefault(key, {})[position] = logprob


class OneRank:
    """A model that is served by one rank.

    Args:
        folder: of its checkpoint, or of its config.json alone if `dummy`.
        target: where it runs.
        sizes: of steps and of the cache.
        dtype: "auto", "float32" or "bfloat16".
        dummy: with random weights.
        enable_prefix_caching: whether prompts that begin alike share blocks.
    """

    def __init__(
        self,
        folder: Path | str,
        target: Target,
        sizes: Sizes,
        *,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        dummy: bool = False,
        enable_prefix_caching: bool = False,
    ) -> None:
        self.config, self.sizes = read_model_config(folder, dtype), sizes
        context = self._context(target)
        self.model = load_model(self.config, context, None if dummy else Checkpoint(folder))
        specs = self.config.cache_specs()
        tokens = sizes.cache_tokens or sizes.max_num_seqs * -(-sizes.max_model_len // BLOCK_SIZE) * BLOCK_SIZE
        blocks = 1 + -(-tokens // BLOCK_SIZE)
        caches = self.model.allocate(
            num_blocks=[blocks] * len(specs), max_model_len=sizes.max_model_len, block_size=BLOCK_SIZE
        )
        self.runner = ModelRunner(
            model=self.model,
            caches=caches,
            num_ranks=1,
            max_num_seqs=sizes.max_num_seqs,
            capture=target.capture,
            max_model_len=sizes.max_model_len,
            block_size=BLOCK_SIZE,
        )
        if target.ops.on_device:
            self.runner.warm_up(sizes.max_num_batched_tokens, sizes.max_num_seqs)
        self._scheduler_config = SchedulerConfig(
            num_ranks=1,
            max_num_seqs=sizes.max_num_seqs,
            max_num_batched_tokens=sizes.max_num_batched_tokens,
            num_blocks=blocks,
            max_queued_requests=4096,
            eos_token_ids=(),
            vocab_size=self.config.vocab_size,
            enable_prefix_caching=enable_prefix_caching,
            original_max_position_embeddings=self.config.original_max_position_embeddings,
            max_model_len=sizes.max_model_len,
            block_size=BLOCK_SIZE,
        )
        self.scheduler = self._scheduler()

    def _context(self, target: Target) -> RankContext:
        config, dtype = self.config, getattr(torch, self.config.dtype)
        placement: Placement | None = None
        all_to_alls: tuple[AllToAll, ...] = ()
        if any(config.sparse_layers):
            placement = place(config.num_experts, 1, 0, config.num_layers)
            spec = AllToAllSpec(
                group=SoloGroup(),
                rank_offsets=placement.rank_offsets,
                max_tokens=self.sizes.max_num_batched_tokens,
                hidden_size=config.dispatch_size,
                top_k=config.top_k,
                dtype=dtype,
            )
            ops = target.ops
            all_to_all: AllToAll = LocalAllToAll(spec, ops.permute) if ops.on_device else ReferenceAllToAll(spec)
            all_to_alls = (all_to_all,)
        return RankContext(
            rank=0, dtype=dtype, device=target.device, ops=target.ops, placement=placement, all_to_alls=all_to_alls
        )

    def _scheduler(self) -> Scheduler:
        return Scheduler(self._scheduler_config, self.config.cache_specs())

    def submit(self, requests: Iterable[Request]) -> None:
        """Let them wait.

        Raises:
            ValueError: one is not accepted.
        """
        for request in requests:
            rejection = self.scheduler.submit(request, 0.0)
            if rejection is not None:
                raise ValueError(f"request {request.key}: {rejection.message}")

    def run(self, most_steps: int | None = None) -> tuple[Answers, list[Step]]:
        """Compute until nothing is left, or for so many steps; as many are launched ahead as the runner allows."""
        answers, steps = Answers(), []
        flying: deque[tuple[StepPlan, Any, float]] = deque()
        planned = 0
        while not self.scheduler.idle:
            began = time.perf_counter()
            more = len(flying) < self.runner.depth and (most_steps is None or planned < most_steps)
            plan = self.scheduler.plan(0.0) if more else None
            if plan is not None:
                planned += 1
                launched = self.runner.launch(plan)
                flying.append((plan, launched, 1e6 * (time.perf_counter() - began)))
                if len(flying) < self.runner.depth:
                    continue
            if not flying:
                break
            plan, launched, host_us = flying.popleft()
            result: StepResult = launched.finish()
            answers.add(self.scheduler.commit(plan, [result], 0.0))
            steps.append(
                Step(
                    tokens=int(plan.num_tokens_P[0]),
                    sequences=len(plan.sched_slot_S),
                    host_us=host_us,
                    device_us=result.forward_us,
                    done_s=time.perf_counter(),
                )
            )
        return answers, steps

    def answer(self, requests: Iterable[Request]) -> Answers:
        """Submit requests and return their outputs when all are complete."""
        self.submit(requests)
        return self.run()[0]


def request(key: int, prompt: Sequence[int] | np.ndarray, **params: Any) -> Request:
    """Greedy, unless `params`, of `SamplingParams`, say otherwise."""
    params = {"temperature": 0.0, "ignore_eos": True, **params}
    return Request(key=key, prompt=np.asarray(prompt, np.int32), params=SamplingParams(**params), seed=7 * key)


def prompts(vocab_size: int, lengths: Sequence[int], seed: int = 0) -> list[np.ndarray]:
    """Random ids; i32."""
    rng = np.random.default_rng([seed, len(lengths)])
    return [rng.integers(0, vocab_size, length, dtype=np.int32) for length in lengths]


def toy_config(name: str, folder: Path) -> Path:
    """Write the config of a model of `CONFIGS` with the same layers, but one, two or so of everything; returns `folder`."""
    config = json.loads((CONFIGS / name / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32}
    config |= {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "num_experts_per_tok": 2,
        "vocab_size": 64,
    }
    config |= {key: 4 for key in ("num_experts", "num_local_experts") if key in config}
    config |= {"layer_types": config["layer_types"][1:2]} if "layer_types" in config else {}
    config |= {key: 1 for key in ("eos_token_id", "bos_token_id") if key in config}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
