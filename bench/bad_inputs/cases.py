"""The bad inputs of `bench.bad_inputs.run`, with the error that each must give."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from expertwire import LLM, SamplingParams, TenantQuota
from expertwire.bench.bad_inputs import bad_strategies
from expertwire.bench.bad_inputs.broken_checkpoints import (
    WEIGHTS,
    Change,
    config,
    copied_tensor,
    header,
    index,
    quantized,
    renamed,
    sharded,
    truncate,
    without,
    writing,
)
from expertwire.bench.bad_inputs.environment import DEMO, Environment
from expertwire.deploy.grpc.messages import from_sampling_params
from expertwire.strategies.cascade import Cascade


@dataclass(frozen=True, kw_only=True)
class Case:
    """A bad input and the error that it must give.

    Args:
        area: section of the page.
        description: the input, as the page shows it.
        run: tries it.
        expected: name of an exception, gRPC status or exit code.
        words: parts that the message must have.
        starts_processes: whether the error can be found only after processes have been started.
    """

    area: str
    description: str
    run: Callable[[Environment], object]
    expected: str
    words: tuple[str, ...]
    starts_processes: bool = False


def cases() -> list[Case]:
    """Return all bad inputs."""
    return [*_options(), *_checkpoints(), *_commands(), *_sampling(), *_prompts(), *_cascades(), *_requests()]


OPTIONS: tuple[tuple[Any, ...], ...] = (
    ({"dtype": "float64"}, "dtype", "auto, float32, bfloat16"),
    ({"device": "tpu"}, "device", "auto, cpu, cuda"),
    ({"launcher": "slurm"}, "launcher", "auto, local, ray"),
    ({"load_format": "gguf"}, "load_format", "auto, dummy, mock"),
    ({"ep_size": 0}, "ep_size", ">= 1"),
    ({"ep_size": "2"}, "ep_size", "integer", "'2'"),
    ({"max_model_len": 1}, "max_model_len", "[2, 2048]"),
    ({"max_model_len": 4096}, "max_model_len", "[2, 2048]"),
    ({"max_model_len": 100.0}, "max_model_len", "integer"),
    ({"max_num_batched_tokens": 0}, "max_num_batched_tokens", ">= 1"),
    ({"max_num_seqs": -1}, "max_num_seqs", ">= 1"),
    ({"max_queued_requests": 0}, "max_queued_requests", ">= 1"),
    ({"max_queued_requests_per_tenant": 0}, "max_queued_requests_per_tenant", ">= 1"),
    ({"chunked_prefill_size": 0}, "chunked_prefill_size", ">= 1"),
    ({"scheduling_policy": "lottery"}, "scheduling_policy", "fcfs, priority, shortest, prefix, fair"),
    ({"scheduling_policy": "priority", "aging": -1}, "aging", "from 0 to"),
    ({"aging": 1.0}, "aging", "no effect", "'priority' or 'shortest'"),
    ({"tenant_quotas": {"a": 2}}, "tenant_quotas['a']", "TenantQuota"),
    ({"tenant_quotas": "a=1"}, "tenant_quotas", "dictionary"),
    ({"tenant_quotas": {"a": TenantQuota(weight=2)}}, "tenant_quotas['a'].weight", "no effect", "'fair'"),
    ({"enable_prefix_caching": "yes"}, "enable_prefix_caching", "True or False"),
    ({"block_size": 0}, "block_size", ">= 1"),
    ({"kv_cache_memory_bytes": 1000}, "1000 bytes", "max_model_len = 2048", "1572864", "raise kv_cache_memory_bytes"),
    ({"kv_cache_memory_bytes": 100_000, "max_model_len": 512}, "128 tokens", "512", "raise kv_cache_memory_bytes"),
    ({"quantization": "fp4"}, "quantization", "fp8, int4, mxfp4"),
    ({"numerics": "exact"}, "numerics", "invariant, fast"),
    ({"kv_cache_dtype": "int8"}, "kv_cache_dtype", "auto, fp8"),
    ({"attention_backend": "flashinfer"}, "attention_backend", "numerics 'fast'"),
    ({"dispatch_dtype": "int8"}, "dispatch_dtype", "auto, fp8"),
    ({"dispatch_dtype": "fp8", "device": "cuda"}, "dispatch_dtype", "fp8_block", "quantization 'fp8'", "dense"),
    ({"all2all_table": "times.json"}, "all2all_table", "no effect with ep_size 1"),
    ({"all2all_table": "times.json", "ep_size": 2, "all2all_backend": "nccl"}, "no effect", "use 'auto'"),
    ({"all2all_table": "/no/such.json", "ep_size": 2}, "all2all_table", "readable file", "/no/such.json"),
    ({"num_redundant_experts": -1}, "num_redundant_experts", ">= 0"),
    ({"num_redundant_experts": 9, "ep_size": 2}, "num_redundant_experts", "allowed: 0 to 8"),
    ({"enable_two_batch_overlap": True}, "enable_two_batch_overlap", "ep_size 1"),
    ({"enable_two_batch_overlap": 1, "ep_size": 2}, "enable_two_batch_overlap", "True or False"),
    ({"topology": "hgx8", "ep_size": 2}, "topology", "num_redundant_experts 0"),
    ({"topology": "/no/such.json", "ep_size": 2, "num_redundant_experts": 2}, "/no/such.json", "nvl72, nvl36, hgx8"),
    ({"threads_per_rank": 0}, "threads_per_rank", ">= 1"),
    ({"seed": 2**63}, "seed", "64-bit"),
    ({"start_timeout_s": 0}, "start_timeout_s", "> 0"),
    ({"step_timeout_s": float("inf")}, "step_timeout_s", "seconds"),
    ({"launcher": "local", "ray_address": "head:6379"}, "ray_address", "'ray' or 'auto'"),
    ({"ray_address": "head"}, "ray_address", "host:port"),
    ({"ray_address": "127.0.0.1:1"}, "ray_address", "nothing answers there"),
    ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization", "(0, 1]"),
    ({"snapshot_every": 0}, "snapshot_every", ">= 1"),
    ({"snapshot_share": 0.9}, "snapshot_share", "[0, 0.5]"),
    ({"tensor_parallel_size": 2}, "tensor_parallel_size", "ep_size"),
)


def _options() -> Iterator[Case]:
    for options, *words in OPTIONS:
        yield _option(options, *words)


def _option(options: dict[str, Any], *words: str) -> Case:
    return Case(
        area="Options of the engine",
        description=_arguments(options),
        run=lambda env: LLM(DEMO, **options),
        expected="TypeError" if "tensor_parallel_size" in options else "ValueError",
        words=words,
    )


TENSOR = "model.layers.0.mlp.experts.0.up_proj.weight"
SCALE = f"{TENSOR}_scale_inv"
AWQ = config(quantization_config={"quant_method": "awq", "bits": 4})
FP8_OF_64 = config(quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]})
CHECKPOINTS: tuple[tuple[Any, ...], ...] = (
    ("no such folder", shutil.rmtree, "there is no folder", "Hugging Face checkpoint"),
    ("no config.json", without("config.json"), "no config.json"),
    ("config.json cut off", writing("config.json", '{"architectures": ['), "config.json", "not valid JSON"),
    ("config.json is a list", writing("config.json", "[]"), "config.json", "JSON object"),
    ("architectures: GPT2LMHeadModel", config(architectures=["GPT2LMHeadModel"]), "architectures", "Qwen3Moe"),
    ("no num_experts_per_tok", config(num_experts_per_tok=None), "num_experts_per_tok", "missing"),
    ("num_experts_per_tok: 9", config(num_experts_per_tok=9), "num_experts_per_tok (9)", "num_experts (8)"),
    ("num_attention_heads: 3", config(num_attention_heads=3), "num_attention_heads (3)", "multiple"),
    ("hidden_act: gelu", config(hidden_act="gelu"), "hidden_act", "'silu'"),
    ("torch_dtype: float16", config(torch_dtype="float16"), "float16", "dtype='bfloat16'"),
    ("num_hidden_layers: 1000000", config(num_hidden_layers=10**6), "num_hidden_layers", "at most 4096"),
    ("quant_method: awq", AWQ, "quantization_config.quant_method", "fp8, mxfp4, compressed-tensors, modelopt", "'awq'"),
    ("FP8 in blocks of 64", FP8_OF_64, "quantization_config.weight_block_size", "[128, 128]", "[64, 64]"),
    ("rope_scaling: dynamic", config(rope_scaling={"type": "dynamic", "factor": 4.0}), "default, linear, llama3, yarn"),
    (
        "rope_scaling: yarn, half of it",
        config(rope_scaling={"type": "yarn", "factor": 4.0}),
        "rope_scaling.original_max",
    ),
    ("sliding_window: 0", config(use_sliding_window=True, sliding_window=0), "sliding_window", ">= 1"),
    ("eos_token_id: 500", writing("generation_config.json", '{"eos_token_id": 500}'), "eos_token_id", "below 128"),
    ("no tokenizer.json", without("tokenizer.json"), "no tokenizer.json"),
    ("only tekken.json", renamed("tokenizer.json", "tekken.json"), "no tokenizer.json", "tekken.json"),
    ("only tiktoken.model", renamed("tokenizer.json", "tiktoken.model"), "tiktoken.model", "TikTokenTokenizer"),
    ("only tokenizer.model", renamed("tokenizer.json", "tokenizer.model"), "no tokenizer.json", "transformers"),
    ("tokenizer.json damaged", writing("tokenizer.json", "{"), "tokenizer.json", "not valid JSON"),
    ("a chat template that is not Jinja", writing("chat_template.jinja", "{% if"), "chat template", "not valid"),
    ("no weights", without(WEIGHTS), "no weights", WEIGHTS),
    ("only pytorch_model.bin", renamed(WEIGHTS, "pytorch_model.bin"), "*.bin", "save them as safetensors"),
    ("a git-lfs pointer", writing(WEIGHTS, "version https://git-lfs.github.com/spec/v1"), "git-lfs", "lfs pull"),
    ("a truncated file", truncate, "is truncated", "bytes, expected"),
    ("a missing shard", sharded(without("b.safetensors")), "lacks b.safetensors"),
    ("an index that lists too much", sharded(index(extra="a.safetensors")), "do not hold", "extra"),
    ("an index of other folders", sharded(index(**{TENSOR: "../a.safetensors"})), "weight_map", "in the same folder"),
    ("an index that lists too little", sharded(index(**{TENSOR: None})), "does not list", TENSOR),
)
# Errors that only a rank can find.
CHECKPOINTS_OF_RANKS: tuple[tuple[Any, ...], ...] = (
    ("a missing tensor", header(lambda tensors: tensors.pop(TENSOR)), "missing", TENSOR),
    ("an unknown tensor", copied_tensor(TENSOR, "copy.weight"), "does not know", "copy.weight"),
    ("a missing scale", quantized(header(lambda tensors: tensors.pop(SCALE))), "missing", SCALE),
    ("a wrong shape", header(lambda tensors: tensors[TENSOR]["shape"].reverse()), TENSOR, "expected [96, 128]"),
    ("an integer tensor", header(lambda tensors: tensors[TENSOR].update(dtype="I16")), TENSOR, "F32, BF16, F16"),
)
HUGE = config(num_experts=1024, moe_intermediate_size=10**7)


def _checkpoints() -> Iterator[Case]:
    for description, change, *words in CHECKPOINTS:
        yield _checkpoint(description, change, *words)
    for description, change, *words in CHECKPOINTS_OF_RANKS:
        yield _checkpoint(description, change, *words, starts_processes=True)
    yield _checkpoint(
        "more weights than memory",
        HUGE,
        "the weights need",
        "are free",
        "ep_size",
        "dtype='bfloat16'",
        starts_processes=True,
        load_format="dummy",
    )


def _checkpoint(description: str, change: Change, *words: str, starts_processes: bool = False, **options: Any) -> Case:
    return Case(
        area="Checkpoints",
        description=description,
        run=lambda env: LLM(env.checkpoint(change), device="cpu", **options),
        expected="EngineFailed" if starts_processes else "ValueError",
        words=words,
        starts_processes=starts_processes,
    )


COMMANDS: tuple[tuple[str, ...], ...] = (
    ("", "COMMAND"),
    ("train", "'train'", "serve, generate, demo, inspect, explain, experts, token, replay, calibrate, bench"),
    ("serve --tensor-parallel-size=2", "--tensor-parallel-size", "--help"),
    ("serve one two", "two"),
    ("serve /no/such/folder --port 0", "there is no folder '/no/such/folder'"),
    ("serve --port 70000", "port", "[0, 65536)"),
    ("serve --port http", "--port", "int", "http"),
    ("serve --port <taken>", "--port", "in use"),
    ("serve --host 203.0.113.1", "--host 203.0.113.1", "--ssl-keyfile", "--insecure"),
    ("serve --host 203.0.113.1 --insecure", "--host 203.0.113.1", "annot assign"),
    ("serve --ssl-certfile cert.pem", "ssl_keyfile", "ssl_certfile"),
    ("serve --ssl-keyfile /no/key --ssl-certfile /no/cert --port 0", "ssl_keyfile /no/key", "No such file"),
    ("serve --tenants /no/tenants.toml --port 0", "tenants file /no/tenants.toml", "No such file"),
    ("serve --audit-log /no/folder/log --port 0", "audit_log /no/folder/log", "No such file"),
    ("token a/b", "the name of a tenant", "letters, digits"),
    ("serve --drain-timeout -1", "drain_timeout_s", ">= 0"),
    ("serve --drain-timeout soon", "--drain-timeout", "float", "soon"),
    ("serve --ep-size two", "--ep-size", "'two'"),
    ("serve --ep-size 0 --port 0", "ep_size", ">= 1"),
    ("serve --scheduling-policy lottery", "--scheduling-policy", "fcfs, priority, shortest, prefix, fair"),
    ("serve --dtype float64", "--dtype", "auto, float32, bfloat16"),
    ("serve --models small", "--models must be NAME=VALUE"),
    ("serve --models a=b model", "MODEL must not be given with --models"),
    ("serve --models a=b --model-options c.ep-size=2", "one of a, got 'c.ep-size=2'"),
    ("serve --models a=b --model-options a.size=2", "--model-options a.size", "unrecognized"),
    ("serve --models a=b,c=d --shares a=1", "--shares", "a, c", "'a=1'"),
    ("serve --shares a=1", "--shares needs --models"),
    ("serve --cascade fast", "--cascade must be NAME=FILE", "'fast'"),
    ("serve --cascade fast=/no/such/policy.json", "policy /no/such/policy.json cannot be read"),
    ("serve --decision-log log.jsonl", "--decision-log needs --cascade"),
    ("serve --models a=/no/such/folder", "/no/such/folder"),
    (
        "calibrate cascade /dev/null --cascade /no/such/policy.json --out /dev/null",
        "policy /no/such/policy.json cannot be read",
    ),
    ("calibrate", "WHAT"),
    (
        "calibrate strategies --prompts /dev/null --baseline best --grader exact --out /dev/null",
        "grader must be a verifier that --strategies or --verifier gives",
    ),
    ("replay", "LOG"),
    ("replay /no/such/log", "decision log /no/such/log cannot be read"),
    ("replay /dev/null --threshold length=1", "threshold must be X or MECHANISM=X", "'length=1'"),
    ("replay /dev/null", "must have at least one record"),
    ("generate", "--prompt"),
    ("generate /no/such/folder --prompt x", "there is no folder '/no/such/folder'"),
    ("generate --prompt x --temperature hot", "--temperature", "'hot'"),
    ("generate --prompt x --top-p 2", "top_p", "(0, 1]"),
    ("demo --launcher slurm", "--launcher", "ray, local"),
    ("explain --device tpu", "--device", "cpu, cuda, h200, b200"),
    ("explain --device cuda", "--device", "cpu, h200 and b200"),
    ("explain --ep-size 0", "--ep-size", ">= 1"),
    ("explain /no/such/folder", "there is no folder '/no/such/folder'"),
    ("bench", "BENCHMARK"),
    ("bench latency", "'latency'", "throughput"),
    ("bench throughput --input-len 0", "input_len", ">= 1"),
    ("bench throughput --json /no/such/folder/x.json", "--json", "/no/such/folder"),
)


def _commands() -> Iterator[Case]:
    for line, *words in (*COMMANDS, *bad_strategies.COMMANDS):
        yield Case(
            area="Commands",
            description=f"expertwire {line}".strip(),
            run=partial(Environment.command, line=line),
            expected="exit code 2",
            words=tuple(words),
        )
    line = "generate --prompt x --device cuda"
    yield Case(
        area="Commands",
        description=f"expertwire {line} (where there is no GPU)",
        run=partial(Environment.command_without_gpu, line=line),
        expected="exit code 1",
        words=("device 'cuda'", "no CUDA device", "device='cpu'"),
        starts_processes=True,
    )


SAMPLING: tuple[tuple[Any, ...], ...] = (
    ({"temperature": -1.0}, "temperature", ">= 0"),
    ({"temperature": float("nan")}, "temperature", "finite"),
    ({"top_p": 0.0}, "top_p", "(0, 1]"),
    ({"top_k": -2}, "top_k", "-1 (all)"),
    ({"min_p": 1.5}, "min_p", "[0, 1]"),
    ({"max_tokens": 0}, "max_tokens", ">= 1"),
    ({"min_tokens": 20, "max_tokens": 16}, "min_tokens", "[0, max_tokens = 16]"),
    ({"seed": 2**63}, "seed", "64-bit"),
    ({"stop": ""}, "stop", "non-empty strings"),
    ({"stop": 5}, "stop", "list of strings"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", ">= 0"),
    ({"stop_token_ids": 7}, "stop_token_ids", "list of token ids"),
    ({"expert_load": "yes"}, "expert_load", "True or False"),
    ({"ignore_eos": "yes"}, "ignore_eos", "True or False"),
    ({"repetition_penalty": 0.0}, "repetition_penalty", "[0.01, 100]"),
    ({"presence_penalty": 3.0}, "presence_penalty", "[-2, 2]"),
    ({"frequency_penalty": -3.0}, "frequency_penalty", "[-2, 2]"),
    ({"logit_bias": {1: 500.0}}, "logit_bias", "[-100, 100]"),
    ({"logit_bias": [1]}, "logit_bias", "dictionary"),
    ({"logprobs": 65}, "logprobs", "[0, 64]"),
    ({"prompt_logprobs": -1}, "prompt_logprobs", "[0, 64]"),
    ({"n": 0}, "n must", "[1, 256]"),
    ({"skip_special_tokens": "no"}, "skip_special_tokens", "True or False"),
    ({"thinking_budget": -1}, "thinking_budget", "None (no limit)"),
    ({"thinking_grace": 5}, "thinking_grace", "no effect without thinking_budget"),
    ({"min_thinking_tokens": 9, "thinking_budget": 8}, "min_thinking_tokens", "[0, thinking_budget = 8]"),
    ({"best_of": 2}, "best_of"),
)


def _sampling() -> Iterator[Case]:
    for params, *words in SAMPLING:
        yield _sampling_params(params, *words)


def _sampling_params(params: dict[str, Any], *words: str) -> Case:
    return Case(
        area="SamplingParams",
        description=_arguments(params),
        run=lambda env: SamplingParams(**params),
        expected="TypeError" if "best_of" in params else "ValueError",
        words=words,
    )


GREEDY = SamplingParams(temperature=0)
PROMPTS: tuple[tuple[Any, ...], ...] = (
    ('generate("")', ("",), "at least one token"),
    ("generate(5)", (5,), "string, token ids"),
    ("generate([[1, 2], None])", ([[1, 2], None],), "prompt 1", "NoneType"),
    ("generate([[1, [2]]])", ([[1, [2]]],), "flat list"),
    ("generate([[1.5]])", ([[1.5]],), "integer token ids"),
    ("generate([[128]])", ([[128]],), "[0, 128)", "got 128"),
    ("generate([[-1]])", ([[-1]],), "[0, 128)", "got -1"),
    ("generate([[5] * 64]), max_model_len=64", ([[5] * 64],), "64 tokens", "at most 63"),
    ('generate({"text": "a"})', ({"text": "a"},), "'prompt' or 'prompt_token_ids'"),
    ('generate({"prompt_token_ids": "a"})', ({"prompt_token_ids": "a"},), "prompt_token_ids"),
    ('generate("SUM", [SamplingParams()] * 2)', ("SUM", [GREEDY] * 2), "sampling_params", "(1), got 2"),
    ('generate("SUM", {"temperature": 0})', ("SUM", {"temperature": 0}), "sampling_params", "SamplingParams"),
    ('generate({"cache_salt": "a"})', ({"cache_salt": "a"},), "'prompt' or 'prompt_token_ids'"),
    ("logit_bias={500: 1}", ("SUM", SamplingParams(logit_bias={500: 1})), "logit_bias", "[0, 128)"),
    ("stop_token_ids=[500]", ("SUM", SamplingParams(stop_token_ids=[500])), "stop_token_ids", "[0, 128)"),
    ("chat([])", ([],), "non-empty list"),
    ('chat([{"content": "a"}])', ([{"content": "a"}],), "'role'"),
)
OPTIONS_OF_CHATS: tuple[tuple[Any, ...], ...] = (
    ({"thinking": "no"}, "thinking", "True, False"),
    ({"thinking": False}, "thinking", "does not read", "enable_thinking or thinking"),
    ({"reasoning_effort": "very"}, "reasoning_effort", "none, minimal, low, medium, high", "got 'very'"),
    ({"tools": "search"}, "tools", "JSON schemas"),
    ({"tools": [{"name": "search"}]}, "tools", "does not read"),
    ({"chat_template_kwargs": {"enable_thinkin": True}}, "chat_template_kwargs", "does not read enable_thinkin;"),
    ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "'tools'"),
    ({"continue_final_message": True}, "continue_final_message", "add_generation_prompt=False"),
    ({"chat_template": "rag"}, "chat_template", "default"),
)
OPTIONS_OF_PROMPTS: tuple[tuple[Any, ...], ...] = (
    ({"priority": 2**31}, "priority", "[-2**31, 2**31)"),
    ({"priority": "high"}, "priority", "integer"),
    ({"priority": [1, 2]}, "priority", "(1), got 2"),
    ({"tenant": 5}, "tenant", "string"),
    ({"cache_salt": "\ud800"}, "cache_salt", "valid Unicode"),
)


def _prompts() -> Iterator[Case]:
    for description, arguments, *words in PROMPTS:
        yield _prompt(description, "chat" if description.startswith("chat") else "generate", arguments, {}, words)
    for options, *words in OPTIONS_OF_CHATS:
        messages = [{"role": "user", "content": "SUM 1 2"}]
        yield _prompt(f"chat(messages, {_arguments(options)})", "chat", (messages,), options, words)
    for options, *words in OPTIONS_OF_PROMPTS:
        yield _prompt(f'generate("SUM", {_arguments(options)})', "generate", ("SUM",), options, words)


def _prompt(
    description: str, method: str, arguments: Sequence[Any], options: dict[str, Any], words: Sequence[str]
) -> Case:
    return Case(
        area="Prompts of the Python API",
        description=description,
        run=lambda env: getattr(env.llm, method)(*arguments, use_tqdm=False, **options),
        expected="ValueError",
        words=tuple(words),
    )


REQUESTS: tuple[tuple[Any, ...], ...] = (
    ("text, of a model without tokenizer", {"prompt": "a"}, "needs a tokenizer", "token ids"),
    ("no token ids", {"prompt": []}, "at least one token"),
    ("token id 128", {"prompt": [128]}, "[0, 128)", "got 128"),
    ("token id -1", {"prompt": [-1]}, "[0, 128)", "got -1"),
    ("2048 token ids, max_model_len=2048", {"prompt": [5] * 2048}, "2048 tokens", "at most 2047"),
    ("a request_id of 300 characters", {"request_id": "x" * 300}, "request_id", "at most 256"),
    ("a tenant of 129 characters", {"tenant": "x" * 129}, "tenant", "at most 128", "got 129"),
    ("a cache_salt of 129 characters", {"cache_salt": "x" * 129}, "cache_salt", "at most 128", "got 129"),
    ('stop="a", of a model without tokenizer', {"stop": "a"}, "stop", "stop_token_ids"),
    ("logit_bias={500: 1.0}", {"logit_bias": {500: 1.0}}, "logit_bias", "[0, 128)"),
    ("stop_token_ids=[500]", {"stop_token_ids": [500]}, "stop_token_ids", "[0, 128)"),
)


def _cascades() -> Iterator[Case]:
    for changes, *words in bad_strategies.CASCADES:

        def make(_: Environment, changes: dict[str, Any] = changes) -> Cascade:
            return Cascade(**{"small": "a", "large": "b", "version": "1", **changes})

        yield Case(
            area="Cascades", description=_arguments(changes), run=make, expected="ValueError", words=tuple(words)
        )


def _requests() -> Iterator[Case]:
    for description, values, *words in REQUESTS:
        yield _request(description, partial(Environment.request, **values), "INVALID_ARGUMENT", *words)
    for params, *words in SAMPLING:
        if _fits_protobuf(params):
            yield _request(_arguments(params), partial(Environment.request, **params), "INVALID_ARGUMENT", *words)
    for strategy, status, *words in bad_strategies.STRATEGIES:
        run = partial(Environment.request, strategy=bad_strategies.value(strategy))
        yield _request(bad_strategies.description(strategy), run, status, *words)
    both = partial(Environment.request, strategy="first_k_finish:n=2", n=2)
    yield _request("strategy=first_k_finish:n=2, n=2", both, "INVALID_ARGUMENT", "n must be", "got 2")
    windowed = partial(Environment.session_request, window_tokens=64, strategy="first_k_finish:n=2")
    yield _request(
        "strategy=first_k_finish:n=2, in a session with window_tokens=64",
        windowed,
        "INVALID_ARGUMENT",
        "strategy must be unset",
        "window_tokens",
    )
    chat = [{"role": "user", "content": "a"}]
    ask = lambda env: list(env.client.chat(chat))  # noqa: E731 - as short as a partial
    yield _request("a chat, of a model without tokenizer", ask, "INVALID_ARGUMENT", "needs a tokenizer", "token ids")
    taken = partial(Environment.request_beside, request_id="first")
    yield _request("a request_id that is running", taken, "ALREADY_EXISTS", "'first'", "is running")
    many = partial(Environment.request, n=2)
    yield _request(
        "n=2, when max_queued_requests=1", many, "INVALID_ARGUMENT", "n must be", "max_queued_requests = 1", "got 2"
    )
    yield _request(
        "Abort without a request_id",
        lambda env: env.client.abort(""),
        "INVALID_ARGUMENT",
        "request_ids",
        "at least one",
    )
    big = partial(Environment.request, priority=2**31)
    yield _request("priority=2**31 (refused by the client)", big, "ValueError", "priority", "2147483648")
    unknown = partial(Environment.request, best_of=2)
    yield _request("best_of=2 (refused by the client)", unknown, "ValueError", "best_of", "max_tokens")


def _request(description: str, run: Callable[[Environment], object], status: str, *words: str) -> Case:
    return Case(area="Requests over gRPC", description=description, run=run, expected=status, words=words)


def _fits_protobuf(params: dict[str, Any]) -> bool:
    try:
        from_sampling_params(params)
    except ValueError:
        return False
    return True


def _arguments(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
