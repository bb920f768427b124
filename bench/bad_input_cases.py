"""The bad inputs of `bench.bad_inputs`: options, checkpoints, commands, parameters, prompts, requests."""

from __future__ import annotations

import contextlib
import importlib.resources
import io
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from expertwire import LLM, SamplingParams
from expertwire.bench import broken_checkpoints as broken
from expertwire.deploy import cli
from expertwire.deploy.grpc_client import Client
from expertwire.deploy.grpc_messages import from_sampling_params

DEMO = Path(str(importlib.resources.files("expertwire") / "demo_model"))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A bad input. `answer` is an exception's name, a gRPC status or an exit code; the message has every word of `says`."""

    area: str
    given: str
    attempt: Callable[[Place], object]
    answer: str
    says: tuple[str, ...]
    starts: bool = False  # only a process can tell


class CommandFailed(Exception):
    """A command exited with `code` and said this on stderr."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Place:
    """Where bad inputs are tried: broken copies of the demo model, an `LLM` and a server, each made when first needed.

    The server has random weights, no tokenizer, and lets one request run and one wait.
    """

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._scratch = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="expertwire-")))
        self._num_copies = 0

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def checkpoint(self, change: Callable[[Path], object] = lambda folder: None) -> Path:
        """A copy of the demo model, changed."""
        self._num_copies += 1
        folder = shutil.copytree(DEMO, self._scratch / str(self._num_copies))
        change(folder)
        return folder

    @cached_property
    def llm(self) -> LLM:
        return self._stack.enter_context(LLM(DEMO, device="cpu", threads_per_rank=1, max_model_len=64))

    @cached_property
    def client(self) -> Client:
        folder = self.checkpoint(broken.without("tokenizer.json"))
        options = f"serve {folder} --load-format dummy --device cpu --port 0 --max-running 1 --max-waiting 1"
        command = [sys.executable, "-P", "-m", "expertwire.deploy.cli", *shlex.split(options)]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._stack.callback(_stop, server)
        assert server.stdout is not None
        return self._stack.enter_context(Client(server.stdout.readline().split()[-1]))

    def plain(self, text: str) -> str:
        """Without what differs from machine to machine."""
        text = re.sub(rf"{re.escape(str(self._scratch))}/\d+", "<checkpoint>", text)
        text = re.sub(r"only [\d.]+ GB", "only <free> GB", text)
        text = re.sub(r"(--port|:)(=| )?\d{5}\b", r"\1\2<port>", text)
        # Python's versions differ in how argparse lists choices.
        return re.sub(r"\(choose from .*?\)", lambda found: found[0].replace("'", ""), " ".join(text.split()))


def cases() -> list[Case]:
    """All bad inputs."""
    return [*_options(), *_checkpoints(), *_commands(), *_sampling(), *_prompts(), *_over_grpc()]


def _options() -> Iterator[Case]:
    for options, *says in (
        ({"dtype": "float64"}, "dtype", "auto, float32, bfloat16"),
        ({"device": "tpu"}, "device", "auto, cpu, cuda"),
        ({"launcher": "slurm"}, "launcher", "auto, local, ray"),
        ({"load_format": "gguf"}, "load_format", "auto, dummy"),
        ({"ep_size": 0}, "ep_size", ">= 1"),
        ({"ep_size": "2"}, "ep_size", "integer", "'2'"),
        ({"max_model_len": 1}, "max_model_len", "[2, 2048]"),
        ({"max_model_len": 4096}, "max_model_len", "[2, 2048]"),
        ({"max_model_len": 100.0}, "max_model_len", "integer"),
        ({"max_num_tokens": 0}, "max_num_tokens", ">= 1"),
        ({"max_running": -1}, "max_running", ">= 1"),
        ({"max_waiting": 0}, "max_waiting", ">= 1"),
        ({"block_size": 0}, "block_size", ">= 1"),
        ({"kv_cache_bytes": 1000}, "1000 bytes", "max_model_len = 2048", "1572864", "raise kv_cache_bytes"),
        ({"kv_cache_bytes": 100_000, "max_model_len": 512}, "128 tokens", "512", "raise kv_cache_bytes"),
        ({"redundant_experts": -1}, "redundant_experts", ">= 0"),
        ({"redundant_experts": 9, "ep_size": 2}, "redundant_experts", "allowed: 0 to 8"),
        ({"threads_per_rank": 0}, "threads_per_rank", ">= 1"),
        ({"seed": 2**63}, "seed", "64-bit"),
        ({"start_timeout_s": 0}, "start_timeout_s", "> 0"),
        ({"step_timeout_s": float("inf")}, "step_timeout_s", "seconds"),
        ({"launcher": "local", "ray_address": "head:6379"}, "ray_address", "'ray' or 'auto'"),
        ({"ray_address": "head"}, "ray_address", "host:port"),
        ({"ray_address": "127.0.0.1:1"}, "ray_address", "nothing answers there"),
    ):
        yield Case(
            area="Options of the engine",
            given=_arguments(options),
            attempt=lambda place, options=options: LLM(DEMO, **options),
            answer="ValueError",
            says=tuple(says),
        )
    yield Case(
        area="Options of the engine",
        given="gpu_memory_utilization=0.9",
        attempt=lambda place: LLM(DEMO, gpu_memory_utilization=0.9),
        answer="TypeError",
        says=("gpu_memory_utilization", "kv_cache_bytes"),
    )


def _checkpoints() -> Iterator[Case]:
    tensor, weights = "model.layers.0.mlp.experts.0.up_proj.weight", "model.safetensors"
    at_once: tuple[tuple[Any, ...], ...] = (
        ("no such folder", shutil.rmtree, "there is no folder", "Hugging Face checkpoint"),
        ("no config.json", broken.without("config.json"), "no config.json"),
        ("config.json cut off", broken.writing("config.json", '{"architectures": ['), "config.json", "not valid JSON"),
        ("config.json is a list", broken.writing("config.json", "[]"), "config.json", "JSON object"),
        (
            "architectures: LlamaForCausalLM",
            broken.config(architectures=["LlamaForCausalLM"]),
            "architectures",
            "Qwen3Moe",
        ),
        ("no num_experts_per_tok", broken.config(num_experts_per_tok=None), "num_experts_per_tok", "missing"),
        ("num_experts_per_tok: 9", broken.config(num_experts_per_tok=9), "num_experts_per_tok (9)", "num_experts (8)"),
        ("num_attention_heads: 3", broken.config(num_attention_heads=3), "num_attention_heads (3)", "multiple"),
        ("hidden_act: gelu", broken.config(hidden_act="gelu"), "hidden_act", "'silu'"),
        ("torch_dtype: float16", broken.config(torch_dtype="float16"), "float16", "dtype='bfloat16'"),
        (
            "quantization_config",
            broken.config(quantization_config={"quant_method": "fp8"}),
            "quantised",
            "not supported yet",
        ),
        ("rope_scaling: yarn", broken.config(rope_scaling={"type": "yarn", "factor": 4.0}), "'yarn'", "only 'default'"),
        (
            "sliding_window: 128",
            broken.config(use_sliding_window=True, sliding_window=128),
            "sliding_window (128)",
            "2048",
        ),
        (
            "eos_token_id: 500",
            broken.writing("generation_config.json", '{"eos_token_id": 500}'),
            "eos_token_id",
            "below 128",
        ),
        ("no tokenizer.json", broken.without("tokenizer.json"), "no tokenizer.json"),
        (
            "only tokenizer.model",
            broken.renamed("tokenizer.json", "tokenizer.model"),
            "no tokenizer.json",
            "transformers",
        ),
        ("tokenizer.json damaged", broken.writing("tokenizer.json", "{"), "tokenizer.json", "cannot be read"),
        (
            "a chat template that is not Jinja",
            broken.writing("chat_template.jinja", "{% if"),
            "chat template",
            "not valid",
        ),
        ("no weights", broken.without(weights), "no weights", weights),
        ("only pytorch_model.bin", broken.renamed(weights, "pytorch_model.bin"), "*.bin", "save them as safetensors"),
        (
            "a git-lfs pointer",
            broken.writing(weights, "version https://git-lfs.github.com/spec/v1"),
            "git-lfs",
            "lfs pull",
        ),
        ("a truncated file", broken.truncate, "is truncated", "bytes, expected"),
        ("a missing shard", broken.sharded(lambda folder: (folder / "b.safetensors").unlink()), "lacks b.safetensors"),
        (
            "an index that lists too much",
            broken.sharded(broken.index({"extra": "a.safetensors"})),
            "do not hold",
            "extra",
        ),
        ("an index that lists too little", broken.sharded(broken.index({tensor: None})), "does not list", tensor),
    )
    by_a_rank: tuple[tuple[Any, ...], ...] = (
        ("a missing tensor", broken.header(lambda header: header.pop(tensor)), "missing", tensor),
        (
            "an unknown tensor",
            broken.header(lambda header: _copy_entry(header, tensor)),
            "does not know",
            "copy.weight",
        ),
        (
            "a wrong shape",
            broken.header(lambda header: header[tensor]["shape"].reverse()),
            tensor,
            "expected [96, 128]",
        ),
        (
            "an integer tensor",
            broken.header(lambda header: header[tensor].update(dtype="I16")),
            tensor,
            "F32, BF16, F16",
        ),
    )
    for given, change, *says in (*at_once, *by_a_rank):
        starts = any(given == other for other, *_ in by_a_rank)
        yield Case(
            area="Checkpoints",
            given=given,
            attempt=lambda place, change=change: LLM(place.checkpoint(change), device="cpu"),
            answer="EngineFailed" if starts else "ValueError",
            says=tuple(says),
            starts=starts,
        )
    huge = broken.config(num_experts=1024, moe_intermediate_size=10**7)
    yield Case(
        area="Checkpoints",
        given="more weights than memory",
        attempt=lambda place: LLM(place.checkpoint(huge), device="cpu", load_format="dummy"),
        answer="EngineFailed",
        says=("the weights need", "are free", "ep_size", "dtype='bfloat16'"),
        starts=True,
    )


def _commands() -> Iterator[Case]:
    for line, *says in (
        ("", "COMMAND"),
        ("train", "'train'", "serve, generate, demo, bench"),
        ("serve --gpu-memory-utilization=0.9", "--gpu-memory-utilization", "--help"),
        ("serve one two", "two"),
        ("serve /no/such/folder --port 0", "there is no folder '/no/such/folder'"),
        ("serve --port 70000", "--port", "[0, 65535]"),
        ("serve --port http", "--port", "http"),
        ("serve --port <taken>", "--port", "in use"),
        ("serve --host no.such.host.invalid", "no.such.host.invalid"),
        ("serve --drain-timeout -1", "--drain-timeout", ">= 0"),
        ("serve --ep-size two", "--ep-size", "'two'"),
        ("serve --ep-size 0 --port 0", "ep_size", ">= 1"),
        ("serve --dtype float64", "--dtype", "auto, float32, bfloat16"),
        ("generate", "--prompt"),
        ("generate /no/such/folder --prompt x", "there is no folder '/no/such/folder'"),
        ("generate --prompt x --temperature hot", "--temperature", "'hot'"),
        ("generate --prompt x --top-p 2", "top_p", "(0, 1]"),
        ("demo --launcher slurm", "--launcher", "ray, local"),
        ("bench", "BENCHMARK"),
        ("bench latency", "'latency'", "throughput"),
        ("bench throughput --input-len 0", "input_len", ">= 1"),
        ("bench throughput --json /no/such/folder/x.json", "--json", "/no/such/folder"),
    ):
        yield Case(
            area="Commands",
            given=f"expertwire {line}".strip(),
            attempt=partial(_command, line=line),
            answer="exit code 2",
            says=tuple(says),
        )
    yield Case(
        area="Commands",
        given="expertwire generate --prompt x --device cuda (where there is no GPU)",
        attempt=_command_without_gpu,
        answer="exit code 1",
        says=("device 'cuda'", "no CUDA device", "device='cpu'"),
        starts=True,
    )


_BAD_SAMPLING: tuple[tuple[Any, ...], ...] = (
    ({"temperature": -1.0}, "temperature", ">= 0"),
    ({"temperature": float("nan")}, "temperature", "finite"),
    ({"top_p": 0.0}, "top_p", "(0, 1]"),
    ({"top_k": -2}, "top_k", "-1 (all)"),
    ({"min_p": 1.5}, "min_p", "[0, 1]"),
    ({"max_tokens": 0}, "max_tokens", ">= 1"),
    ({"min_tokens": 20}, "min_tokens", "[0, max_tokens = 16]"),
    ({"seed": 2**63}, "seed", "64-bit"),
    ({"stop": ""}, "stop", "non-empty strings"),
    ({"stop": 5}, "stop", "list of strings"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", ">= 0"),
    ({"stop_token_ids": 7}, "stop_token_ids", "list of token ids"),
    ({"ignore_eos": "yes"}, "ignore_eos", "True or False"),
    ({"repetition_penalty": 0.0}, "repetition_penalty", "> 0"),
    ({"presence_penalty": 3.0}, "presence_penalty", "[-2, 2]"),
    ({"frequency_penalty": -3.0}, "frequency_penalty", "[-2, 2]"),
    ({"logit_bias": {1: 500.0}}, "logit_bias", "[-100, 100]"),
    ({"logit_bias": [1]}, "logit_bias", "dictionary"),
    ({"logprobs": 65}, "logprobs", "[0, 64]"),
    ({"prompt_logprobs": -1}, "prompt_logprobs", "[0, 64]"),
    ({"n": 0}, "n must", "[1, 256]"),
    ({"skip_special_tokens": 1}, "skip_special_tokens", "True or False"),
)


def _sampling() -> Iterator[Case]:
    for params, *says in _BAD_SAMPLING:
        yield Case(
            area="SamplingParams",
            given=_arguments(params),
            attempt=lambda place, params=params: SamplingParams(**params),
            answer="ValueError",
            says=tuple(says),
        )
    yield Case(
        area="SamplingParams",
        given="best_of=2",
        attempt=lambda place: SamplingParams(**{"best_of": 2}),
        answer="TypeError",
        says=("best_of",),
    )


def _prompts() -> Iterator[Case]:
    greedy = SamplingParams(temperature=0)
    for given, method, arguments, *says in (
        ('prompt ""', "generate", ("",), "at least one token"),
        ("[5]", "generate", (5,), "string, token ids"),
        ("[[1, 2], None]", "generate", ([[1, 2], None],), "prompt 1", "NoneType"),
        ("[[1, [2]]]", "generate", ([[1, [2]]],), "flat list"),
        ("[[1.5]]", "generate", ([[1.5]],), "integer token ids"),
        ("[[128]]", "generate", ([[128]],), "[0, 128)", "128"),
        ("[[-1]]", "generate", ([[-1]],), "[0, 128)", "-1"),
        ("64 tokens, max_model_len 64", "generate", ([[5] * 64],), "64 tokens", "at most 63"),
        ('{"text": "a"}', "generate", ({"text": "a"},), "'prompt' or 'prompt_token_ids'"),
        ('{"prompt_token_ids": "a"}', "generate", ({"prompt_token_ids": "a"},), "prompt_token_ids"),
        ("1 prompt, 2 SamplingParams", "generate", (["SUM"], [greedy] * 2), "sampling_params", "(1), got 2"),
        ('{"temperature": 0}', "generate", ("SUM", {"temperature": 0}), "sampling_params", "SamplingParams"),
        ("logit_bias={500: 1}", "generate", ("SUM", SamplingParams(logit_bias={500: 1})), "logit_bias", "[0, 128)"),
        ("stop_token_ids=[500]", "generate", ("SUM", SamplingParams(stop_token_ids=[500])), "stop_token_ids", "128"),
        ("[]", "chat", ([],), "non-empty list"),
        ('[{"content": "a"}]', "chat", ([{"content": "a"}],), "'role'"),
    ):
        yield Case(
            area="Prompts of the Python API",
            given=f"LLM.{method}: {given}",
            attempt=lambda place, m=method, a=arguments: getattr(place.llm, m)(*a, use_tqdm=False),
            answer="ValueError",
            says=tuple(says),
        )


def _over_grpc() -> Iterator[Case]:
    requests: list[tuple[Any, ...]] = [
        ("empty text", {"prompt": ""}, "needs a tokenizer", "token ids"),
        ("text, model without tokenizer", {"prompt": "a"}, "needs a tokenizer", "token ids"),
        ("no token ids", {"prompt": []}, "at least one token"),
        ("token id 128", {"prompt": [128]}, "[0, 128)", "128"),
        ("token id -1", {"prompt": [-1]}, "[0, 128)", "-1"),
        ("2048 token ids, max_model_len 2048", {"prompt": [5] * 2048}, "2048 tokens", "at most 2047"),
        ("request_id of 300 characters", {"request_id": "x" * 300}, "request_id", "at most 256"),
        ('stop="a", model without tokenizer', {"stop": "a"}, "stop", "stop_token_ids"),
        ("logit_bias={500: 1.0}", {"logit_bias": {500: 1.0}}, "logit_bias", "[0, 128)"),
        ("stop_token_ids=[500]", {"stop_token_ids": [500]}, "stop_token_ids", "[0, 128)"),
    ]
    requests += [(_arguments(params), params, *says) for params, *says in _BAD_SAMPLING if _fits_the_wire(params)]
    for given, values, *says in requests:
        yield _request(given, partial(_generate, values=values), "INVALID_ARGUMENT", *says)
    yield _request(
        "n=3, room for one waiting", partial(_generate, values={"n": 3}), "RESOURCE_EXHAUSTED", "max_waiting"
    )
    yield _request("a request_id that is running", _generate_twice, "ALREADY_EXISTS", "'mine'", "running")
    yield _request("Abort of an unknown request_id", lambda place: place.client.abort("x"), "NOT_FOUND", "'x'")
    unknown = partial(_generate, values={"best_of": 2})
    yield _request("best_of=2 (our client refuses it)", unknown, "ValueError", "best_of", "max_tokens")


def _request(given: str, attempt: Callable[[Place], object], status: str, *says: str) -> Case:
    return Case(area="Requests over gRPC", given=given, attempt=attempt, answer=status, says=says)


def _generate(place: Place, values: dict[str, Any]) -> None:
    list(place.client.generate(**{"prompt": [5], "max_tokens": 16, **values}))


def _generate_twice(place: Place) -> None:
    first = place.client.generate([5], request_id="mine", max_tokens=2000, ignore_eos=True)
    next(iter(first))
    try:
        _generate(place, {"request_id": "mine"})
    finally:
        first.close()


def _fits_the_wire(params: dict[str, Any]) -> bool:
    try:
        from_sampling_params(params)
    except ValueError:
        return False
    return True


def _command(place: Place, line: str) -> None:
    """Run a command in this process; `<taken>` becomes a port that is in use."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    err = io.StringIO()
    with socket.create_server(("127.0.0.1", 0)) as taken, contextlib.redirect_stderr(err):
        try:
            code = cli.main(shlex.split(line.replace("<taken>", str(taken.getsockname()[1]))))
        except SystemExit as leaving:
            code = leaving.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    raise CommandFailed(int(code or 0), err.getvalue())


def _command_without_gpu(place: Place) -> None:
    command = [sys.executable, "-P", "-m", "expertwire.deploy.cli", "generate", "--prompt", "x", "--device", "cuda"]
    done = subprocess.run(["env", "CUDA_VISIBLE_DEVICES=", *command], capture_output=True, text=True)
    raise CommandFailed(done.returncode, done.stderr)


def _stop(server: subprocess.Popen) -> None:
    family = psutil.Process(server.pid).children(recursive=True)
    server.terminate()
    server.wait(30)
    _, left = psutil.wait_procs(family, timeout=5)
    assert not left, f"the server left {left} behind"


def _copy_entry(header: dict[str, Any], name: str) -> None:
    header["copy.weight"] = header[name]


def _arguments(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
