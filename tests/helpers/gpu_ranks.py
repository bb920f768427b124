"""Engines on GPUs that are not there: the controller's side in the test, every rank a thread that runs the worker's `worker_main`
over strict fakes of torch.cuda, NCCL and symmetric memory."""

from __future__ import annotations

import secrets
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch.distributed as dist

from expertwire.comm import symmetric_memory
from expertwire.comm.control.channel import ControlHub
from expertwire.comm.topology import probe as topology_probe
from expertwire.engine import worker
from expertwire.engine.config.engine_config import EngineConfig, ModelInfo
from expertwire.engine.models.registry import read_model_config
from expertwire.engine.startup import ControllerArgs, scheduler_config, start_ranks
from expertwire.scheduler.plan import StepResult
from expertwire.scheduler.request import Request
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.scheduler.scheduler import Scheduler
from helpers.fake_cuda import FakeCuda, OnCpu
from helpers.fake_nccl import FakeProcessGroupNCCL
from helpers.fake_symmetric_memory import FakeSymmetricMemory


@dataclass(frozen=True)
class Served:
    """`tokens`: the first one of each request."""

    info: ModelInfo
    tokens: list[int]
    memory: FakeSymmetricMemory
    errors: list[str]


def install(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> FakeSymmetricMemory:
    """Put the fakes in torch's place; the GPUs of a node reach each other."""
    cuda.install(monkeypatch)
    memory = FakeSymmetricMemory(timeout_s=60)
    monkeypatch.setattr(symmetric_memory, "_SymmetricMemory", memory)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", FakeProcessGroupNCCL, raising=False)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(topology_probe, "peers_of", lambda mine: [i for i in range(cuda.num_devices) if i != mine])
    return memory


def serve(config: EngineConfig, gpus: Sequence[int], prompts: Sequence[Sequence[int]], memory: object) -> Served:
    """Start the engine, rank r on device `gpus[r]`, and step until every prompt has a token."""
    model = read_model_config(config.model, config.dtype)
    token = secrets.token_hex(8)
    hub = ControlHub(config.ep_size, address="tcp:127.0.0.1:0", token=token)
    args = ControllerArgs(config=config, model=model, max_model_len=64, hub_address=hub.address, token="unused")
    errors: list[str] = []

    def run(rank: int) -> None:
        with OnCpu():
            try:
                worker.worker_main(config, rank, config.ep_size, hub.address, token, "node", gpus[rank])
            except BaseException:  # noqa: BLE001 - the test shall hear of it
                errors.append(traceback.format_exc())

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(config.ep_size)]
    for thread in threads:
        thread.start()
    try:
        info, _ = start_ranks(args, hub)
        tokens = first_tokens(args, info, hub, prompts)
    finally:
        hub.close()
        for thread in threads:
            thread.join(60)
    return Served(info, tokens, memory, errors)


def first_tokens(args: ControllerArgs, info: ModelInfo, hub: ControlHub, prompts: Sequence[Sequence[int]]) -> list[int]:
    scheduler = Scheduler(scheduler_config(args, info), args.model.cache_specs())
    for key, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=1, temperature=0)
        assert scheduler.submit(Request(key=key, prompt=np.array(prompt, np.int32), params=params, seed=0), 0.0) is None
    tokens: dict[int, int] = {}
    while not scheduler.idle:
        plan = scheduler.plan(0.0)
        hub.publish(plan.to_arrays())
        outputs = scheduler.commit(plan, [StepResult.from_arrays(answer) for answer in hub.collect(120)], 0.0)
        tokens |= dict(zip(outputs.key_O.tolist(), outputs.token_O.tolist(), strict=True))
    return [tokens[key] for key in range(len(prompts))]
