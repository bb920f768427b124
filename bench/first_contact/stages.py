"""The stages of `bench first_contact`, in the order of their value. Each function is a stage and takes a `Run`.

On a CPU they do the same on toy sizes, with the GPU's kernels interpreted; there, nothing is timed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from expertwire.bench.first_contact.stage_process import Run
from expertwire.bench.first_contact.stage_record import NOT_RUN
from expertwire.bench.machine import processor

PERFORMANCE = "performance.md"
_PEERS = ("transformers", "flashinfer", "flash_attn", "deep_gemm", "cupy", "ray", "numba", "grpc", "grpc_health")
_PACKAGES = ("torch", "triton", "numpy", "transformers", "flashinfer-python", "setuptools", "safetensors", "tokenizers")
_QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,memory.used"
_WRITING_S = 5.0  # of a stage's time, left to write down what it has found


def environment(run: Run) -> None:
    """Versions, the device and its clocks, the peers that are installed, and what the device can do at most."""
    import torch
    import triton

    run.record.fact("cpu", processor())
    run.record.fact("python", platform.python_version())
    found = {name: _version(name) for name in _PACKAGES}
    run.record.fact("versions", {name: version for name, version in found.items() if version})
    run.record.fact("peers", [name for name in _PEERS if importlib.util.find_spec(name) is not None])
    run.record.fact("interpreted", bool(triton.knobs.runtime.interpret))
    if run.toy:
        return
    from expertwire.bench.kernels.measure import measure_ceilings
    from expertwire.kernels.gpu.device import SUPPORTED, describe

    with run.record.item("device"):
        properties = torch.cuda.get_device_properties(0)
        device = {
            "name": properties.name,
            "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "count": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
        }
        run.record.fact("device", device)
        run.record.check("compute capability", describe("cuda:0").is_supported, f"allowed are {SUPPORTED}")
    with run.record.item("NCCL"):
        run.record.fact("NCCL", list(torch.cuda.nccl.version()))
    with run.record.item("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        run.record.fact("nvidia-smi", dict(zip(_QUERY.split(","), done.stdout.strip().split(", "), strict=False)))
    with run.record.item("ceilings"):
        for name, rate in measure_ceilings(quick=True).items():
            run.record.figure(f"ceiling {name}", rate / 1e12, "TB/s" if name == "bytes_per_s" else "TFLOP/s")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def tokens(run: Run) -> None:
    """Check a small model's tokens: GPU against CPU, with CUDA graphs against without, alone against in a batch."""
    from expertwire.bench.first_contact import one_rank_checks as checks

    dtypes: tuple[checks.Dtype, ...] = ("float32",) if run.toy else ("float32", "bfloat16")
    for dtype in dtypes:
        for check in (checks.like_the_cpu, checks.graphs_change_nothing, checks.company_changes_nothing):
            name = f"{check.__name__.replace('_', ' ')}, {dtype}"
            if not run.record.wants(name):
                continue
            with run.record.item(name):
                try:
                    says = check(run.device, dtype)
                except AssertionError as error:
                    run.record.check(name, False, str(error))
                else:
                    run.record.check(name, True, says)


def kernels_correct(run: Run) -> None:
    """Compare every kernel with its reference on random inputs; outputs are filled with NaN before."""
    _kernels(run, ("check-experts", "check-attention", "check-layer-ops"))


def kernels_bits(run: Run) -> None:
    """Check whether a row's bits depend on the batch or the tile, and report which tiles the invariant mode may use."""
    results = _kernels(run, ("bits",))
    wide = {
        key: classes
        for _, key, item in results.items(kind="classes")
        for name, classes in item["classes"].items()
        if name.startswith("tiles of prefill")
    }
    if wide and not run.toy:
        from expertwire.kernels.gpu.device import describe

        equal = all(len(classes) == 1 for classes in wide.values())
        arch = describe("cuda").arch
        text = (
            f"EQUAL_BITS: frozenset[int] = frozenset({{{arch}}})" if equal else "leave EQUAL_BITS without " + str(arch)
        )
        run.record.fact(
            "kernels/gpu/attention.py", f"{text}  # {len(wide)} shapes compared, {'' if equal else 'not '}equal"
        )


def kernels_timed(run: Run) -> None:
    """Time the experts of Qwen3-30B-A3B and attention, against the device's limits and other libraries."""
    _timed_kernels(run, ("experts-qwen3", "attention"))


def kernels_timed_more(run: Run) -> None:
    """Time experts in the other formats, routing and the remaining ops of a layer."""
    _timed_kernels(
        run,
        (
            "experts-deepseek",
            "routing",
            "experts-gpt-oss",
            "sampling",
            "latent",
            "layer-ops",
            "recurrent",
            "experts-more",
        ),
    )


def _timed_kernels(run: Run, parts: tuple[str, ...]) -> None:
    if run.toy:
        run.record.fact(NOT_RUN, "kernels are timed on a GPU only")
        return
    from expertwire.bench.kernels.results import issue_bars

    for bar in issue_bars(_kernels(run, parts)):
        if bar["value"] is not None:
            run.record.figure(bar["what"], bar["value"], bar["unit"], bar=bar["bar"], source=bar["source"])


def _kernels(run: Run, parts: tuple[str, ...]) -> Any:
    """`bench kernels` with these parts; it resumes by itself. Returns its results."""
    from expertwire.bench.kernels import run as kernels
    from expertwire.bench.kernels.results import NAME, Results

    more = ["--resume"] if (run.out / NAME).exists() else []
    argv = ["--out", str(run.out), "--only", ",".join(parts), "--device", run.device, *more]
    kernels.main(kernels.make_parser().parse_args(argv), seconds=max(1.0, run.until - time.time() - _WRITING_S))
    results = Results.read(run.out)
    for part, key, item in results.items():
        if part not in parts:
            continue
        if "error" in item:
            run.record.failure(key, item.get("traceback", item["error"]))
        elif "ok" in item:
            run.record.check(key, item["ok"], json.dumps(item.get("findings", item.get("classes")))[:400])
    if left := results.data.get("not_reached"):
        run.record.fact("not reached in time", {part: len(keys) for part, keys in left.items()})
    return results


def engine(run: Run) -> None:
    """Qwen3-30B-A3B with random weights: decode, prefill and mixed steps, with graphs and without, and a trace in short."""
    _engine(run, "qwen3-30b-a3b", {64: 3800.0, 256: 10_000.0}, batches=(64, 1, 256, 16), whole=True)


def engine_gpt_oss(run: Run) -> None:
    """gpt-oss-120b with random weights, experts in MXFP4: decode."""
    _engine(run, "gpt-oss-120b", {}, batches=(64, 1), whole=False)


def _engine(run: Run, name: str, bars: Mapping[int, float], batches: tuple[int, ...], *, whole: bool) -> None:
    """`whole`: more than decode steps with graphs."""
    from expertwire.bench.first_contact import one_rank_times as times
    from expertwire.bench.first_contact.one_rank import CONFIGS, OneRank, Sizes, Target, toy_config

    sizes = Sizes(max_num_seqs=256, max_num_batched_tokens=8192, max_model_len=8448, cache_tokens=100_000)
    context, num = 256, 64
    with tempfile.TemporaryDirectory(prefix="model-") as folder:
        model = CONFIGS / name
        options: dict[str, Any] = {"dummy": True, "enable_prefix_caching": False}
        if run.toy:
            model, sizes, batches, context, num = toy_config(name, Path(folder)), Sizes(
                max_num_seqs=2, max_num_batched_tokens=8, max_model_len=48
            ), (2,), 3, 2  # fmt: skip
            options["dtype"] = "float32"
        for graphs in (True, False) if whole else (True,):
            how = "" if graphs else ", no graphs"
            target = Target.gpu(run.device, graphs=graphs)
            todo: dict[str, Callable[..., Any]] = {
                f"decode {batch}{how}": partial(times.decode, batch=batch, context=context, num_steps=num)
                for batch in (batches if graphs else batches[:1])
            }
            most = min(64, sizes.max_num_seqs - 1)
            if whole:
                todo[f"trace of decode {most}{how}"] = partial(
                    times.trace, batch=most, context=context, num_steps=num // 10 + 2
                )
            if whole and graphs:
                todo |= _other_steps(run, most, context)
            _run_items(run, partial(OneRank, model, target, sizes, **options), todo, bars)


def _other_steps(run: Run, batch: int, context: int) -> dict[str, Callable[..., list[Any]]]:
    """Prompts alone, and beside requests that decode."""
    from expertwire.bench.first_contact import one_rank_times as times

    lengths, chunks, number = ((8,), (4,), 1) if run.toy else ((8192, 2048, 256), (128, 448, 1500), 6)
    todo: dict[str, Callable[..., list[Any]]] = {
        f"prefill {length}": partial(times.prefill, length=length, number=number) for length in lengths
    }
    for chunk in chunks:
        todo[f"mixed {batch} + {chunk}"] = partial(
            times.mixed, batch=batch, context=context, chunk=chunk, number=number
        )
    return todo


def _run_items(
    run: Run, make: Callable[[], Any], todo: Mapping[str, Callable[..., Any]], bars: Mapping[int, float]
) -> None:
    """Measure what has not been, on one rank. After an error it is of no use: another process goes on with another one."""
    rank = None
    for item, measure in todo.items():
        if not run.record.wants(item):
            continue
        with run.record.item(item, fatal=True):
            rank = rank or make()
            found = measure(rank)
            if item.startswith("trace"):
                run.record.fact(item, {"steps": found["steps"]} if run.toy else found)
                run.record.figure(f"{item}: host", found["launches_per_step"], "launches a step")
                run.record.figure(f"{item}: gaps", found["gap_us_per_step"], "us a step")
            else:
                _step_figures(run, item, found, bars)
    del rank
    _forget(run)


def _step_figures(run: Run, item: str, steps: list[Any], bars: Mapping[int, float]) -> None:
    from expertwire.bench.first_contact import one_rank_times as times

    assert steps, f"{item}: no such step was run"
    run.record.fact(f"{item}: steps", len(steps))
    if run.toy:
        return
    found = times.medians(steps)
    kind, number = item.split()[:2]
    rate = times.tokens_per_s(steps) if kind == "decode" else steps[0].tokens / found["device_us"] * 1e6
    bar = bars.get(int(number)) if item == f"decode {number}" else None
    run.record.figure(item, rate, "tok/s", bar=bar, source=PERFORMANCE if bar else "")
    run.record.figure(f"{item}: device", found["device_us"], "us a step")
    run.record.figure(f"{item}: host", found["host_us"], "us a step")


def _forget(run: Run) -> None:
    """Give memory back."""
    import gc

    gc.collect()
    if not run.toy:
        import torch

        torch.cuda.empty_cache()


def serve(run: Run) -> None:
    """Measure the whole engine (frontend, controller, rank) on random prompts, 64 at a time, as `expertwire bench throughput`."""
    if run.toy:
        run.record.fact(NOT_RUN, "the CPU engine has its own bench")
        return
    from expertwire.bench.first_contact.one_rank import CONFIGS
    from expertwire.bench.serving import throughput

    parser = argparse.ArgumentParser()
    throughput.add_arguments(parser)
    file = run.out / "throughput.json"
    argv = [str(CONFIGS / "qwen3-30b-a3b"), "--load-format", "dummy", "--device", "cuda", "--max-model-len", "1024"]
    argv += [
        "--input-len",
        "256",
        "--output-len",
        "128",
        "--num-prompts",
        "256",
        "--concurrency",
        "64",
        "--json",
        str(file),
    ]
    with run.record.item("throughput"):
        throughput.main(parser.parse_args(argv))
        result = json.loads(file.read_text())
        run.record.figure("served, 64 at a time", result["tokens_per_s"]["output"]["all"], "output tok/s")
        run.record.figure("served: TPOT", result["tpot_ms"]["median"], "ms")
        run.record.figure("served: TTFT", result["ttft_ms"]["median"], "ms")


def exchange(run: Run) -> None:
    """Ranks that share the GPU: all in one process, with and without graphs; as processes; one rank's kernels alone, timed."""
    if run.toy:
        from expertwire.bench.kernels import interpreter

        interpreter.prepare()
    shape = (
        {"num_experts": 8, "top_k": 2, "hidden_size": 128}
        if run.toy
        else {"num_experts": 128, "top_k": 8, "hidden_size": 2048}
    )
    for num_ranks in (2,) if run.toy else (2, 4, 8):
        for tokens, format in ((2, "bf16"),) if run.toy else ((16, "bf16"), (16, "fp8"), (1024, "bf16"), (1024, "fp8")):
            name = f"{num_ranks} ranks in one process, {tokens} tokens in {format}"
            if run.record.wants(name):
                with run.record.item(name):
                    _in_one_process(run, name, num_ranks, tokens, format, shape)
    for num_ranks in (2,) if run.toy else (2, 4, 8):
        name = f"{num_ranks} processes"
        if run.record.wants(name):
            with run.record.item(name):
                from expertwire.bench.all_to_all import processes

                most = max(5.0, min(60.0, run.until - time.time() - _WRITING_S))
                tokens, steps = (2, 1) if run.toy else (16, 10)
                processes.run(num_ranks, tokens, **shape, steps=steps, device=run.device, timeout_s=most)
                run.record.check(name, True, f"{steps} exchanges of {tokens} tokens a rank came home as they went")
    if not run.toy:
        _loopback(run)


def _in_one_process(run: Run, name: str, num_ranks: int, tokens: int, format: str, shape: Mapping[str, int]) -> None:
    import torch

    from expertwire.bench.all_to_all import shared

    steps = 1 if run.toy else 5
    options: dict[str, Any] = {**shape, "steps": steps, "device": run.device}
    rows = shared.run(num_ranks, tokens, format, **options)
    with torch.inference_mode():
        done = [next(rows)["graph"]] if run.toy else [row["graph"] for row in rows]  # there are no graphs on a CPU
    says = " and ".join("with graphs" if graph else "without graphs" for graph in done)
    run.record.check(name, True, f"{steps} exchanges {says} came home as they went")


def _loopback(run: Run) -> None:
    """Time one rank of 8 whose peers' symmetric buffers are on this GPU: its kernels without a link between GPUs."""
    from expertwire.bench.all_to_all import loopback

    for tokens in (1, 128, 1024):
        for format in ("bf16", "fp8"):
            name = f"loopback 8 ranks, {tokens} tokens in {format}"
            if run.record.wants(name):
                with run.record.item(name):
                    for row in loopback._row(8, tokens, format, 64, 7168, 8):
                        run.record.figure(name, row["graph_us"], "us")
                        run.record.fact(name, row)


def flashinfer(run: Run) -> None:
    """FlashInfer's attention beside ours, where it is installed."""
    if importlib.util.find_spec("flashinfer") is None:
        run.record.fact(NOT_RUN, "flashinfer is not installed")
        return
    if run.toy:
        run.record.fact(NOT_RUN, "flashinfer needs a GPU")
        return
    from expertwire.bench.kernels import flashinfer as kernels_flashinfer

    for name in kernels_flashinfer.STEPS:
        if run.record.wants(name):
            with run.record.item(name):
                found = kernels_flashinfer.compare(name)
                run.record.check(
                    f"{name}: equal", found["error"] <= found["allowed"], f"differ by {found['error']:.2g}"
                )
                run.record.figure(f"{name}: ours over flashinfer's time", found["ours_us"] / found["theirs_us"], "x")
                run.record.figure(f"{name}: flashinfer", found["theirs_us"], "us")
