"""`python -m expertwire.bench.serving.soak`: a soak test with many concurrent gRPC streams, some of which clients cancel.

It starts a server and keeps `--streams` calls open, each with a random prompt and output length, and cancels some of them after a
random time. At the end no request, used block or process may be left, else it exits with 1. Memory is reported by process and
quarter of the time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil

from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.deploy.proto import expertwire_v1_pb2_grpc as pb_grpc

_SETTLE_S = 10.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--disconnect", type=float, default=0.3, help="fraction of calls that clients cancel")
    parser.add_argument("--json", type=Path)
    parser.add_argument("serve", nargs=argparse.REMAINDER, help="arguments of `expertwire serve`, after --")
    args = parser.parse_args()
    with server([a for a in args.serve if a != "--"]) as (address, process):
        result = asyncio.run(_load(address, process, args))
        family = process.children(recursive=True)
        process.terminate()
        result["exit_code"] = process.wait(60)
        _, alive = psutil.wait_procs(family, timeout=10)
        result["orphans"] = [p.pid for p in alive]
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    clean = result["left"] == {"num_running": 0, "num_waiting": 0, "blocks_used": 0}
    return 0 if clean and not result["orphans"] and not result["exit_code"] and not result["unexpected"] else 1


@contextlib.contextmanager
def server(arguments: list[str]) -> Iterator[tuple[str, psutil.Popen]]:
    """`expertwire serve` on a free port: its address and process, ended at the end."""
    command = [sys.executable, "-m", "expertwire.deploy.cli", "serve", "--port", "0", *arguments]
    process = psutil.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if line.startswith("serving "):
                yield line.split()[-1], process
                return
        raise RuntimeError(f"the server ended with code {process.wait()} before it was ready")
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
        process.wait(60)


async def _load(address: str, process: psutil.Popen, args: argparse.Namespace) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    memory: list[tuple[float, list[float]]] = []
    began = time.monotonic()
    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.InferenceStub(channel)
        info = await stub.GetModelInfo(pb.GetModelInfoRequest())
        clients = [
            asyncio.create_task(_client(stub, info, random.Random(i), began + args.seconds, args.disconnect, counts))
            for i in range(args.streams)
        ]
        while time.monotonic() < began + args.seconds:
            await asyncio.sleep(5)
            memory.append((time.monotonic() - began, await asyncio.to_thread(_memory_mib, process)))
        await asyncio.gather(*clients)
        left = await _left(stub)
    quarters = [[sample for t, sample in memory if t * 4 // args.seconds == i] for i in range(4)]
    return {
        "model": info.name,
        "streams": args.streams,
        "seconds": args.seconds,
        "calls": dict(counts),
        "unexpected": {name: n for name, n in counts.items() if name.startswith("status ")},
        "tokens_per_s": counts["tokens"] / args.seconds,
        "left": left,
        "processes": ["server", "controller", *(f"rank {rank}" for rank in range(info.ep_size))],
        "pss_mib_quarters": [[round(statistics.median(mib), 1) for mib in zip(*q, strict=True)] for q in quarters],
        "pss_mib_quarters_total": [round(statistics.median(map(sum, q)), 1) for q in quarters],
    }


async def _client(
    stub: pb_grpc.InferenceStub,
    info: pb.ModelInfo,
    rng: random.Random,
    until: float,
    share: float,
    counts: Counter[str],
) -> None:
    longest = info.max_model_len
    while time.monotonic() < until:
        prompt = [rng.randrange(info.vocab_size) for _ in range(rng.randint(1, longest // 2))]
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=prompt),
            sampling_params=pb.SamplingParams(max_tokens=rng.randint(1, longest // 2), ignore_eos=True),
        )
        call = stub.Generate(request)
        patience = rng.expovariate(1 / 2.0) if rng.random() < share else None
        try:
            async with asyncio.timeout(patience):
                async for response in call:
                    counts["tokens"] += sum(len(chunk.token_ids) for chunk in response.chunks)
                counts["completed"] += 1
        except TimeoutError:
            call.cancel()
            counts["disconnected"] += 1
        except grpc.aio.AioRpcError as error:
            counts[f"status {error.code().name}"] += 1


async def _left(stub: pb_grpc.InferenceStub) -> dict[str, int]:
    """Return the requests and blocks that are still in use, after waiting for the last steps."""
    deadline = time.monotonic() + _SETTLE_S
    while True:
        values = (await stub.GetStats(pb.GetStatsRequest())).values
        left = {
            "num_running": int(values["num_running"]),
            "num_waiting": int(values["num_waiting"]),
            "blocks_used": int(sum(sum(used) for used in values["blocks_used"].values())),
        }
        if not any(left.values()) or time.monotonic() > deadline:
            return left
        await asyncio.sleep(0.5)


def _memory_mib(process: psutil.Popen) -> list[float]:
    """Return the proportional set size of each process, in the order of their start."""
    family = [process, *sorted(process.children(recursive=True), key=lambda member: member.pid)]
    return [member.memory_full_info().pss / 2**20 for member in family]


if __name__ == "__main__":
    sys.exit(main())
