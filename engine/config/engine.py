"""What is run: the engine's options, as frozen values passed explicitly."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from expertwire.engine.frontend.request_options import check_name
from expertwire.scheduler.checks import is_int, is_number
from expertwire.scheduler.config import SchedulerConfig
from expertwire.scheduler.policy import make_policy


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options of an engine; each is also an argument of `expertwire.LLM` and an option of `expertwire serve`.

    Args:
        model: folder of a Hugging Face checkpoint.
        dtype: of weights and activations: "auto" (the checkpoint's), "float32" or "bfloat16".
        device: "auto" (cuda if there is one), "cpu" or "cuda".
        ep_size: ranks; each holds the attention of its own requests and a share of the experts.
        launcher: "auto" (ray if `ray_address` is given, else local), "local" or "ray".
        ray_address: of a running Ray cluster; None lets the ray launcher start one here.
        load_format: "auto" (safetensors) or "dummy" (random weights of sane scale, real shapes).
        quantize: hold experts that the checkpoint has unquantised as "fp8" (blocks of 128 x 128), "int4" or "mxfp4" (groups of
            32); None: as they are.
        numerics: "invariant" (a token's log-probabilities have the same bits in any batch, whole or in chunks, cached or not, at
            any `ep_size`) or "fast" (they may differ in the last bits: prompts of latent attention take fewer multiplications,
            and attention on a GPU tiles whose sums are ordered otherwise; on Blackwell rows that meet experts of MXFP4 are
            quantised to MXFP8 and those that meet NVFP4 to NVFP4, which changes more than last bits).
        attention: whose kernels compute attention on a GPU: "triton" (ours) or "flashinfer" (the library of that name, with
            numerics "fast" and the extra "flashinfer"; steps do not replay CUDA graphs; not yet run by us).
        max_model_len: prompt and output tokens of one request at most; None takes the model's.
        max_num_tokens: token budget of one step on one rank (longer prompts are computed in chunks); None: 8,192 on a GPU, 2,048
            on a CPU.
        max_running: requests that run at once on one rank.
        max_waiting: requests that may wait; more are answered RESOURCE_EXHAUSTED.
        max_waiting_per_tenant: of them, requests of one tenant; None: no limit of its own.
        chunk_tokens: prompt tokens of one step on a rank that also decodes, so that no decode waits for more; None:
            `max_num_tokens`.
        policy: which waiting request is served next: "fcfs" (the first to come), "priority" (of the lowest `priority`),
            "shortest" (with the fewest tokens left), "prefix" (with the most tokens in the prefix cache) or "fair" (of the
            tenant that has had the least for its weight).
        aging: what a second of waiting is worth, so that nothing starves: units of priority with the policy "priority", tokens
            with "shortest"; None takes 0.1 and 100.
        tenant_weights: shares of the policy "fair" by tenant, a dictionary (a command takes a=1,b=3); any other tenant has 1.
        prefix_cache: keep the KV blocks of finished requests for later ones that begin alike.
        block_size: tokens in a block of the KV cache.
        kv_cache_dtype: of keys, values and latents: "auto" (that of activations, whatever the checkpoint was calibrated for) or
            "fp8" (e4m3, half the bytes of bfloat16, with the checkpoint's scales, or 1.0 where it has none).
        kv_cache_bytes: of one rank; None takes what `max_running` requests of `max_model_len` need, at most what there is: on a
            GPU what `gpu_memory_utilization` leaves, on a CPU half of the memory that is free after loading.
        gpu_memory_utilization: share of a GPU's memory for weights, caches and everything else that a rank holds at its largest
            step; what others have taken of the GPU counts, too.
        redundant_experts: physical experts beyond the logical ones.
        topology: where the ranks are: a file of NVLink domains, nodes and what fails together, or "nvl72", "nvl36" or "hgx8";
            None: what they find on their machines. Tokens go to replicas in their own domain as far as these are used evenly, and
            when experts move, the first two replicas of each come to lie where they do not fail together.
        rebalance_steps: after so many steps, again and again, see whether it pays to move experts to other ranks, and do so
            while requests are served; 0: never.
        all_to_all: how tokens travel between ranks: "auto" (the best of the others that these ranks can use), "reference"
            (torch's all_to_all_single), "nccl" (grouped sending and receiving) or "nvlink" (ranks write rows into each other's
            memory: over NVLink between GPUs, in shared memory between CPU ranks of one machine).
        all_to_all_table: a file of measured times, as `expertwire bench all-to-all --sweep` writes it, by which "auto" chooses;
            None: by where the ranks are and how large steps can be.
        dispatch_dtype: of rows on their way to experts: "fp8" (numbers of 8 bits, 128 to a scale: half the bytes of bfloat16) or
            "auto" (that of activations; between GPUs "fp8" where all experts are "fp8" in blocks, which would quantise rows just
            so). On a CPU "fp8" rounds what experts see, and saves no time.
        two_batch_overlap: compute every step in two halves: what one sends to other ranks travels while the other computes. The
            same bits; it pays where steps are large and travelling takes long.
        threads_per_rank: of the CPU ranks; None shares the machine's cores.
        seed: from which the seeds of requests without one are drawn.
        start_timeout_s: a rank that is not ready by then is an error.
        step_timeout_s: a step that takes longer is an error naming the ranks that have not answered.
    """

    model: str
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    ep_size: int = 1
    launcher: Literal["auto", "local", "ray"] = "auto"
    ray_address: str | None = None
    load_format: Literal["auto", "dummy"] = "auto"
    quantize: Literal["fp8", "int4", "mxfp4"] | None = None
    numerics: Literal["invariant", "fast"] = "invariant"
    attention: Literal["triton", "flashinfer"] = "triton"
    max_model_len: int | None = None
    max_num_tokens: int | None = None
    max_running: int = 256
    max_waiting: int = 4096
    max_waiting_per_tenant: int | None = None
    chunk_tokens: int | None = None
    policy: Literal["fcfs", "priority", "shortest", "prefix", "fair"] = "fcfs"
    aging: float | None = None
    tenant_weights: Mapping[str, float] | None = None
    prefix_cache: bool = True
    block_size: int = 16
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    kv_cache_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    redundant_experts: int = 0
    topology: str | None = None
    rebalance_steps: int = 0
    all_to_all: Literal["auto", "reference", "nccl", "nvlink"] = "auto"
    all_to_all_table: str | None = None
    dispatch_dtype: Literal["auto", "fp8"] = "auto"
    two_batch_overlap: bool = False
    threads_per_rank: int | None = None
    seed: int = 0
    start_timeout_s: float = 300.0
    step_timeout_s: float = 120.0

    def __post_init__(self) -> None:
        for field, hint in get_type_hints(EngineConfig).items():
            value, allowed = getattr(self, field), _choices(hint)
            if allowed and value not in allowed:
                raise ValueError(f"{field} must be one of {', '.join(map(str, allowed))}, got {value!r}")
            if hint is bool and not isinstance(value, bool):
                raise ValueError(f"{field} must be True or False, got {value!r}")
        for field, low in (
            ("ep_size", 1),
            ("max_running", 1),
            ("max_waiting", 1),
            ("block_size", 1),
            ("redundant_experts", 0),
            ("rebalance_steps", 0),
        ):
            _check_int(field, getattr(self, field), low)
        for field in (
            "max_model_len",
            "max_num_tokens",
            "max_waiting_per_tenant",
            "chunk_tokens",
            "kv_cache_bytes",
            "threads_per_rank",
        ):
            if getattr(self, field) is not None:
                _check_int(field, getattr(self, field), 1)
        share = self.gpu_memory_utilization
        if not is_number(share) or not 0 < share <= 1:
            raise ValueError(f"gpu_memory_utilization must be a number in (0, 1], got {share!r}")
        self._check_ranks()
        self._check_attention()
        self._check_table()
        self._check_policy()
        for field in ("start_timeout_s", "step_timeout_s"):
            value = getattr(self, field)
            if not is_number(value) or value <= 0:
                raise ValueError(f"{field} must be a number of seconds > 0, got {value!r}")
        if not is_int(self.seed) or not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must be a 64-bit integer, got {self.seed!r}")
        if self.ray_address is not None and not isinstance(self.ray_address, str):
            raise ValueError(f'ray_address must be "host:port", "auto" or None, got {self.ray_address!r}')
        if self.ray_address is not None and self.launcher == "local":
            raise ValueError(
                f"ray_address {self.ray_address!r} has no effect with launcher 'local'; use 'ray' or 'auto'"
            )

    def _check_ranks(self) -> None:
        for field in ("rebalance_steps", "two_batch_overlap"):
            if (value := getattr(self, field)) and self.ep_size == 1:
                raise ValueError(f"{field} {value} has no effect with ep_size 1, where nothing travels; use more ranks")
        if self.topology is not None and not isinstance(self.topology, str):
            raise ValueError(
                f"topology must be the path of a file, 'nvl72', 'nvl36', 'hgx8' or None, got {self.topology!r}"
            )
        if self.topology is not None and not self.redundant_experts:
            raise ValueError(
                f"topology {self.topology!r} has no effect with redundant_experts 0, where none has a replica"
            )

    def _check_attention(self) -> None:
        if self.attention == "triton":
            return
        for field, allowed in (("numerics", "fast"), ("two_batch_overlap", False), ("kv_cache_dtype", "auto")):
            if (value := getattr(self, field)) != allowed:
                raise ValueError(
                    f"attention {self.attention!r} needs {field} {allowed!r}, got {value!r}; or use 'triton'"
                )
        if self.device == "cpu":
            raise ValueError(f"attention must be 'triton' with device 'cpu', got {self.attention!r}")

    def _check_table(self) -> None:
        if self.all_to_all_table is None:
            return
        if not isinstance(self.all_to_all_table, str):
            raise ValueError(f"all_to_all_table must be the path of a file or None, got {self.all_to_all_table!r}")
        if self.all_to_all != "auto":
            raise ValueError(f"all_to_all_table has no effect with all_to_all {self.all_to_all!r}; use 'auto'")
        if self.ep_size == 1:
            raise ValueError("all_to_all_table has no effect with ep_size 1, where nothing travels; use more ranks")

    def _check_policy(self) -> None:
        if self.tenant_weights is not None:
            if not isinstance(self.tenant_weights, Mapping):
                raise ValueError(
                    f"tenant_weights must be a dictionary of names and weights, got {self.tenant_weights!r}"
                )
            object.__setattr__(self, "tenant_weights", dict(self.tenant_weights))
            for tenant in self.tenant_weights:
                check_name("tenant_weights: a tenant", tenant)
        make_policy(self.policy, aging=self.aging, tenant_weights=self.tenant_weights)

    @property
    def num_parts(self) -> int:
        """In which a step is computed."""
        return 2 if self.two_batch_overlap else 1

    def on(self, device: str) -> EngineConfig:
        """Return these options with what depends on the device ("cpu" or "cuda", maybe with a number) decided."""
        if self.max_num_tokens is not None:
            return self
        return dataclasses.replace(self, max_num_tokens=2048 if device == "cpu" else 8192)

    @property
    def step_tokens(self) -> int:
        """Of one rank in one step, at most; there is a number once the device is known."""
        assert self.max_num_tokens is not None, "max_num_tokens depends on the device: see `on`"
        return self.max_num_tokens

    @property
    def part_tokens(self) -> int:
        """Of one rank in one part of a step, at most."""
        return -(-self.step_tokens // self.num_parts)

    def resolved_launcher(self) -> Literal["local", "ray"]:
        """The launcher that "auto" means here."""
        if self.launcher == "auto":
            return "ray" if self.ray_address is not None else "local"
        return self.launcher


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a front tells its clients about the model it serves."""

    name: str
    path: str
    architecture: str
    dtype: str
    kv_cache_dtype: str  # of keys, values and latents: "fp8", or `dtype`
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    num_layers: int
    num_experts: int
    top_k: int
    ep_size: int
    device: str
    all_to_all: str  # and why; "" if nothing travels
    block_size: int
    cache_tokens: int  # that fit on one rank, of all requests together
    cache_blocks: dict[str, int]  # of each cache by name, one rank
    cache_bytes: dict[str, int]  # likewise
    max_running: int  # one rank
    seed: int

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelInfo:
        return cls(**{**values, "eos_token_ids": tuple(values["eos_token_ids"])})


def too_many_branches(n: int, limits: EngineConfig | SchedulerConfig) -> str | None:
    """Why a request of `n` branches can never wait; None if it can."""
    for field in ("max_waiting", "max_waiting_per_tenant"):
        if (allowed := getattr(limits, field)) is not None and n > allowed:
            return f"n must be at most {field} = {allowed}, got {n}"
    return None


def _choices(hint: Any) -> list[Any]:
    """What a `Literal`, or one that may be None, allows; nothing for any other type."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    named = [choice for member in members if get_origin(member) is Literal for choice in get_args(member)]
    return [*([None] if named and NoneType in members else []), *named]


def _check_int(field: str, value: object, low: int) -> None:
    if not is_int(value) or value < low:
        raise ValueError(f"{field} must be an integer >= {low}, got {value!r}")
