"""Check of symmetric memory, signals and waits across processes: several ranks on one GPU, each a process.

The group is one of gloo, because NCCL refuses ranks on one device; torch allows symmetric memory there only if
TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES is 1 (CUDASymmetricMemory.cu, `allow_overlapping_devices`). The processes share
the GPU by time slices, so that times mean nothing. On a CPU the kernels are interpreted, over shared memory.

Never run on a GPU by us. T tokens, K experts a token, D model width.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from expertwire.bench.all_to_all.step import Eager, Member, check, echo
from expertwire.comm import symmetric_memory
from expertwire.comm.all_to_all import cost_model
from expertwire.comm.all_to_all.base import AllToAllSpec
from expertwire.comm.all_to_all.symmetric_buffer import BufferLayout
from expertwire.comm.group import Group, TorchGroup
from expertwire.engine import process

_MAX_POLLS = 10**9  # of a wait in the interpreter


def run(
    num_ranks: int,
    tokens: int,
    *,
    num_experts: int,
    top_k: int,
    hidden_size: int,
    steps: int,
    device: str,
    timeout_s: float,
) -> None:
    """Run `steps` exchanges, each checked by every rank.

    Raises:
        ValueError: a rank has failed and printed its error, or did not finish in time.
    """
    shape = {"tokens": tokens, "num_experts": num_experts, "top_k": top_k, "hidden_size": hidden_size, "steps": steps}
    children: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        try:
            for rank in range(num_ranks):
                args = (rank, num_ranks, folder, device, timeout_s, shape)
                children.append(process.start_call(f"{__name__}:rank_main", *args))
            wait_ranks(children, timeout_s)
        finally:
            process.stop_all(children, 2.0, grace_s=0.0)


def wait_ranks(children: Sequence[subprocess.Popen[bytes]], timeout_s: float) -> None:
    """Wait until every rank's process has ended.

    Raises:
        ValueError: a rank has failed, or did not finish in time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        codes = [child.poll() for child in children]
        for rank, code in enumerate(codes):
            if code:
                raise ValueError(f"rank {rank} {process.describe_exit(code)}")
        if None not in codes:
            return
        if time.monotonic() > deadline:
            waiting = [rank for rank, code in enumerate(codes) if code is None]
            raise ValueError(f"ranks {waiting} have not finished within {timeout_s:g} s")
        time.sleep(0.02)


def rank_main(rank: int, size: int, folder: str, device: str, timeout_s: float, shape: dict[str, int]) -> None:
    """Run a rank's process."""
    from expertwire.bench.kernels import interpreter
    from expertwire.comm.all_to_all.nvlink_gpu import NvlinkGpuAllToAll  # needs Triton

    if device == "cpu":
        interpreter.prepare()
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), size)
    group = TorchGroup(store=store, rank=rank, size=size, device="cpu", local_ip="127.0.0.1", timeout_s=timeout_s)
    tokens, num_experts, top_k, hidden_size = (
        shape[name] for name in ("tokens", "num_experts", "top_k", "hidden_size")
    )
    spec = AllToAllSpec(
        group=group,
        rank_offsets=(0, *np.cumsum(cost_model.even(num_experts, size)).tolist()),
        max_tokens=tokens,
        hidden_size=hidden_size,
        top_k=top_k,
        dtype=torch.bfloat16,
        timeout_s=timeout_s,
    )
    with torch.inference_mode():
        memories = _memories(group, BufferLayout.of(spec).nbytes, device)
        all_to_all = NvlinkGpuAllToAll(spec, memories, num_programs=4, max_turns=_MAX_POLLS)
        rng = np.random.default_rng([size, rank])
        for _ in range(shape["steps"]):
            ids_TK = np.array([rng.permutation(num_experts)[:top_k] for _ in range(tokens)])
            x_TD = torch.from_numpy(rng.standard_normal((tokens, hidden_size), np.float32)).to(device, torch.bfloat16)
            member = Member(
                all_to_all=all_to_all,
                x_TD=x_TD,
                physical_TK=torch.from_numpy(ids_TK).to(device),
                num_tokens_P=[tokens] * size,
            )
            exchange = Eager([member])
            [arrived] = exchange.dispatch()
            exchange.answer([echo(arrived, x_TD)])
            [home_TKD] = exchange.combine()
            all_to_all.check()
            check(home_TKD, x_TD, "bf16")
        group.barrier()
        group.close()


def _memories(group: Group, nbytes: int, device: str) -> list[Tensor]:
    if device == "cpu":
        return symmetric_memory.shared(group, nbytes)
    assert isinstance(group, TorchGroup)
    torch.cuda.set_device(0)
    return symmetric_memory.symmetric(group, nbytes, torch.device("cuda", 0))
