"""`python -m expertwire.bench crossover`: a hybrid beside attention everywhere, by the length of the context.

Two small models of nearly equal active parameters (`MODELS`), in one layout (Nemotron-H's): four mixers, each with a mixture of
experts behind it. The hybrid has Mamba-2 in three of them and attention in the last, the other model attention in all. Weights
are random, as times do not depend on them. For each context: the time until the first token, and the time of a token from then
on, of one request on one compute thread, as processor time of all processes of the engine and by the clock on the wall. Models
alternate, so that noise of the machine affects both. `--plot FILE` draws a file of results again.

The claims beside the plot are of Mitra et al., "Characterizing State Space Model and Hybrid Language Model Performance with Long
Context" (2025, arXiv 2507.12442), of whole models on consumer GPUs: the transformers' time to the first token is up to 1.9 times
shorter below 8K tokens, that of the state space models up to 4 times shorter at about 57K.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from expertwire.bench.serving import throughput
from expertwire.bench.serving.peers import generate, time_generation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COMMON: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "torch_dtype": "bfloat16",
    "hidden_size": 256,
    "vocab_size": 4096,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "layer_norm_epsilon": 1e-5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "mamba_num_heads": 7,  # so that both mixers have nearly the same number of parameters
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 1,
    "conv_kernel": 4,
    "use_conv_bias": True,
    "intermediate_size": 256,
    "mlp_hidden_act": "relu2",
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 256,
    "moe_shared_expert_intermediate_size": 256,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
}
MODELS: Mapping[str, Mapping[str, Any]] = {
    name: {**_COMMON, "hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern)}
    for name, pattern in (("hybrid", "MEMEME*E"), ("attention", "*E*E*E*E"))
}
_LONG = 16384  # contexts above it are measured `--long-rounds` times
_CLAIMS = {8192: "attention up to 1.9x faster\nbelow 8K [1]", 57344: "state space up to 4x\nfaster at 57K [1]"}
_SOURCE = "[1] Mitra et al., arXiv 2507.12442: whole models on consumer GPUs, time to the first token"


def run(argv: Sequence[str]) -> int:
    """Measure, or read `--plot`; print, write and draw the results. Return 0."""
    parser = argparse.ArgumentParser(
        prog="python -m expertwire.bench crossover",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=[256 * 2**i for i in range(9)])
    parser.add_argument("--output", type=int, default=65, help="tokens of an output (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of a context (default: %(default)s)")
    parser.add_argument(
        "--long-rounds", type=int, default=2, help=f"the same above {_LONG} tokens (default: %(default)s)"
    )
    parser.add_argument("--note", default="", help="what the results have to say about the machine")
    parser.add_argument("--json", type=Path, help="file for the results, written after every round")
    parser.add_argument("--plot", type=Path, help="draw these results instead of measuring")
    parser.add_argument("--png", type=Path, help="file for the plot; needs matplotlib")
    args = parser.parse_args(argv)
    if args.output < 2 or min(args.contexts) < 1 or args.rounds < 1 or args.long_rounds < 1:
        parser.error("--output must be at least 2, --contexts, --rounds and --long-rounds at least 1")
    if args.plot and args.json:
        parser.error("--json has no effect with --plot, which measures nothing")
    result = json.loads(args.plot.read_text()) if args.plot else measure(args)
    print(table(result))
    if args.png:
        plot(result).savefig(args.png, dpi=110, bbox_inches="tight")
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the results of both models, and write them as far as they are after every round."""
    samples: dict[tuple[str, int], list[dict[str, float]]] = {}
    result: dict[str, Any] = {"machine": throughput.machine("cpu"), "note": args.note, "output": args.output}
    began, generator = time.monotonic(), np.random.default_rng(0)
    with contextlib.ExitStack() as stack:
        folders = stack.enter_context(_folders())
        result["active parameters"] = {name: _active(folder) for name, folder in folders.items()}
        frontends = {
            name: stack.enter_context(_engine(folder, max(args.contexts) + args.output))
            for name, folder in folders.items()
        }
        for frontend in frontends.values():
            _sample(frontend, generator.integers(0, 4096, (1, min(600, max(args.contexts)))), 4)
        for number in range(max(args.rounds, args.long_rounds)):
            for context in sorted(args.contexts):
                if number >= (args.long_rounds if context > _LONG else args.rounds):
                    continue
                prompt = generator.integers(0, 4096, (1, context))
                for name, frontend in frontends.items():
                    sample = _sample(frontend, prompt, args.output)
                    samples.setdefault((name, context), []).append(sample)
                    print(f"{time.monotonic() - began:4.0f} s  {name} {context}: {_line(sample)}", flush=True)
            result["load average"] = throughput.machine("cpu")["load_average"]
            result["rows"] = [_summary(*row) for row in samples.items()]
            if args.json:
                args.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


@contextlib.contextmanager
def _folders() -> Iterator[dict[str, Path]]:
    with tempfile.TemporaryDirectory(prefix="expertwire-crossover-") as folder:
        for name, config in MODELS.items():
            path = Path(folder, name)
            path.mkdir()
            (path / "config.json").write_text(json.dumps(config))
        yield {name: Path(folder, name) for name in MODELS}


def _active(folder: Path) -> int:
    """Return the parameters that a token uses, without embedding and head, which both models have alike."""
    from expertwire.engine.loader.inspection import inspect

    found = inspect(folder)
    return found.active - found.parameters["embedding"] - found.parameters["head"]


@contextlib.contextmanager
def _engine(folder: Path, max_model_len: int) -> Iterator[Any]:
    from expertwire.deploy.runtime import open_frontend
    from expertwire.engine.config.engine_config import EngineConfig

    config = EngineConfig(
        model=str(folder),
        load_format="dummy",
        device="cpu",
        launcher="local",
        threads_per_rank=1,
        max_model_len=max_model_len,
        max_num_seqs=1,
        kv_cache_memory_bytes=2**26 + 2**13 * max_model_len,  # attention everywhere needs 4 KiB a token
        enable_prefix_caching=False,
        step_timeout_s=600,
    )
    with open_frontend(config) as frontend:
        yield frontend


def _sample(frontend: Any, prompt: np.ndarray, output: int) -> dict[str, float]:
    """Return seconds of processors and of the wall, until the first token and for each of the others."""
    prefill, decode, num_decoded = time_generation(functools.partial(generate, frontend, prompt, output), 1)
    return {
        "ttft_cpu_s": prefill.processor,
        "ttft_wall_s": prefill.wall,
        "tpot_cpu_s": decode.processor / num_decoded,
        "tpot_wall_s": decode.wall / num_decoded,
    }


def _line(sample: Mapping[str, float]) -> str:
    return (
        f"first token {sample['ttft_cpu_s']:.2f} s, then {1e3 * sample['tpot_cpu_s']:.2f} ms a token (processor time)"
    )


def _summary(key: tuple[str, int], samples: list[dict[str, float]]) -> dict[str, Any]:
    medians = {name: statistics.median(sample[name] for sample in samples) for name in samples[0]}
    return {"model": key[0], "context": key[1], **medians, "samples": samples}


def series(result: Mapping[str, Any], figure: str) -> dict[str, dict[int, float]]:
    """Return a figure's medians by model and context."""
    found: dict[str, dict[int, float]] = {name: {} for name in MODELS}
    for row in result["rows"]:
        found[row["model"]][row["context"]] = row[figure]
    return {name: dict(sorted(values.items())) for name, values in found.items()}


def crossover(result: Mapping[str, Any], figure: str) -> float | None:
    """Return the shortest context from which on the hybrid is faster; None: not in the last one that was measured.

    Between two contexts the ratio is interpolated, in logarithms. The first context is returned if the hybrid is faster in all.
    """
    found = series(result, figure)
    ratios = [
        (math.log(context), math.log(found["hybrid"][context] / value)) for context, value in found["attention"].items()
    ]
    if ratios[-1][1] >= 0:
        return None
    for (x, y), (next_x, next_y) in reversed(list(pairwise(ratios))):
        if y >= 0:
            return math.exp(x + (next_x - x) * y / (y - next_y))
    return math.exp(ratios[0][0])


def table(result: Mapping[str, Any]) -> str:
    """Return the results as text."""
    found = {figure: series(result, figure) for figure in ("ttft_cpu_s", "tpot_cpu_s")}
    lines = ["          first token, s of processor time      a token, ms of processor time"]
    lines += [f"{'context':>8}" + 2 * f"{'hybrid':>10}{'attention':>11}{'ratio':>8}  "]
    for context in found["ttft_cpu_s"]["hybrid"]:
        cells = []
        for figure, scale in (("ttft_cpu_s", 1), ("tpot_cpu_s", 1e3)):
            ours, theirs = (found[figure][name][context] for name in MODELS)
            cells.append(f"{scale * ours:>10.3f}{scale * theirs:>11.3f}{theirs / ours:>8.2f}  ")
        lines.append(f"{context:>8}" + "".join(cells))
    for figure, name in (("ttft_cpu_s", "time to the first token"), ("tpot_cpu_s", "time of a token")):
        lines.append(f"{name}: {_crossover_text(result, figure)}")
    return "\n".join(lines)


def _crossover_text(result: Mapping[str, Any], figure: str) -> str:
    first, found = min(row["context"] for row in result["rows"]), crossover(result, figure)
    if found is None:
        return "the hybrid is not faster at any length that was measured"
    return f"the hybrid is faster from {'at most ' if found <= first * 1.0001 else ''}{found:,.0f} tokens on"


def plot(result: Mapping[str, Any]) -> Figure:
    """Return the plot of both times.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(13, 6))
    panels = (("ttft_cpu_s", 1.0, "time to the first token, s"), ("tpot_cpu_s", 1e3, "time of a token, ms"))
    for axes, (name, scale, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for number, model in enumerate(MODELS):
            rows = sorted((row for row in result["rows"] if row["model"] == model), key=lambda row: row["context"])
            middle = [scale * row[name] for row in rows]
            ends = [[scale * end(sample[name] for sample in row["samples"]) for row in rows] for end in (min, max)]
            spread = [[m - low for m, low in zip(middle, ends[0], strict=True)]]
            spread.append([high - m for m, high in zip(middle, ends[1], strict=True)])
            active = result["active parameters"][model] / 1e6
            text = f"{model}, {active:.2f}M active parameters"
            contexts = [row["context"] for row in rows]
            axes.errorbar(contexts, middle, spread, marker="o", capsize=3, color=f"C{number}", label=text)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="context, tokens", ylabel=f"{label} of processor time", title=_crossover_text(result, name))
        axes.set_xticks(contexts, [f"{context / 1024:g}k" for context in contexts])
        axes.grid(visible=True, which="both", alpha=0.25)
        axes.legend(loc="upper left")
        for context, claim in _CLAIMS.items() if name == "ttft_cpu_s" else ():
            axes.axvline(context, color="gray", linestyle="--", linewidth=1)
            axes.annotate(
                claim, (context, 0.02), xycoords=("data", "axes fraction"), xytext=(-4, 0), textcoords="offset points",
                ha="right", fontsize=8, color="dimgray",
            )  # fmt: skip
    machine, note = result["machine"], result["note"]
    title = f"Mamba-2 in three of four mixers beside attention in all: one request, one thread of {machine['cpu']}"
    figure.suptitle("\n".join([title, *([note] if note else [])]), y=1.02)
    figure.text(0.5, 0.0, _SOURCE, ha="center", fontsize=8, color="dimgray")
    return figure
