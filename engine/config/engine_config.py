"""`EngineConfig`, the engine's options, and `ModelInfo`, the model and the limits of a running engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from expertwire.comm.topology.backend_choice import Backend
from expertwire.scheduler.config import is_int, is_number
from expertwire.scheduler.policy import PolicyName, make_policy
from expertwire.scheduler.quotas import TenantQuota
from expertwire.scheduler.sampling_params import SamplingParams

_MAX_NAME = 128  # characters
_MAY_BE_ZERO = ("num_redundant_experts", "eplb_step_interval")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options of the engine; each is also an argument of `expertwire.LLM` and an option of `expertwire serve`.

    Args:
        model: folder of a Hugging Face checkpoint, or its name on the hub ("org/name"), which is taken from the hub's cache or
            downloaded into it.
        revision: branch, tag or commit of a model of the hub; None: the main branch.
        served_model_name: name of the model that clients see; None: the last part of `model`.
        dtype: type of weights and activations: "auto" (the checkpoint's), "float32" or "bfloat16".
        device: "auto" (cuda if there is a GPU), "cpu" or "cuda".
        ep_size: number of ranks; each computes attention for its own requests and holds a share of the experts.
        launcher: what starts the ranks: "local" (processes on this machine), "ray", or "auto" (ray if `ray_address` is
            set, else local).
        ray_address: address of a running Ray cluster ("host:port"), "auto" for the one on this machine, or "local" to start
            Ray here; None: Ray's variable RAY_ADDRESS if it is set, else "local", when the launcher is ray.
        load_format: "auto" (safetensors), "dummy" (random weights with the model's shapes) or "mock" (no model at all:
            ranks that compute nothing answer with pseudo-random tokens, to measure scheduler, fronts and clients).
        mock_step_time_s: seconds that a step of the load format "mock" takes at least, up to 1.
        generation_config: defaults of sampling parameters that a request leaves unset: "auto" (those of the model's
            generation_config.json, if it has one), "model" (the same, and its lack is an error) or "none" (those of
            `SamplingParams`).
        quantization: format in which to hold experts that the checkpoint stores unquantised: "fp8" (blocks of
            128 x 128), "int4" or "mxfp4" (groups of 32); None keeps them as they are.
        numerics: "invariant" (the log-probabilities of a token have the same bits in any batch, with any chunking, with
            or without cached prefixes and at any `ep_size`) or "fast" (they may differ in the last bits: prefill of
            latent attention takes fewer multiplications, and attention kernels on a GPU choose tiles by the size of the
            batch; on Blackwell activations are also quantised for 4-bit experts, to MXFP8 for MXFP4 and to NVFP4 for
            NVFP4, which changes more than the last bits).
        attention_backend: attention kernels on a GPU: "triton" (this package's) or "flashinfer" (the library; needs
            numerics "fast" and the extra "flashinfer", and steps do not replay CUDA graphs; never run yet).
        max_model_len: maximum number of prompt and output tokens of one request; None takes the model's.
        max_num_batched_tokens: maximum number of tokens in one step of one rank; longer prompts are prefilled in chunks;
            None: 8,192 on a GPU, 2,048 on a CPU.
        max_num_seqs: maximum number of requests that run at once on one rank.
        max_queued_requests: maximum number of waiting requests; more are refused with RESOURCE_EXHAUSTED.
        max_queued_requests_per_tenant: the same for each tenant; None sets no limit of its own.
        chunked_prefill_size: maximum number of prompt tokens in a step of a rank that also decodes, which bounds the
            time between output tokens; None: `max_num_batched_tokens`.
        scheduling_policy: order in which waiting requests are served: "fcfs" (first come, first served), "priority"
            (lowest `priority` first), "shortest" (fewest remaining tokens first), "prefix" (most tokens in the prefix
            cache first) or "fair" (tenants share tokens, slots and cache by the weights of their quotas, and running
            requests of one that has more give way).
        aging: how much a second of waiting counts, so that no request starves: in units of priority with the scheduling
            policy "priority", in tokens with "shortest"; None takes 0.1 and 100.
        tenant_quotas: shares and limits of tenants, a dictionary of names and `TenantQuota`s; None: there are none. Not an
            option of the command line: `serve` takes them from its file of tenants.
        default_tenant_quota: `TenantQuota` of each tenant that `tenant_quotas` does not name; None sets no limits.
        enable_prefix_caching: reuse the KV blocks of earlier requests for prompts with the same prefix.
        block_size: number of tokens in a block of the KV cache.
        kv_cache_dtype: type of cached keys, values and latents: "auto" (that of activations) or "fp8" (e4m3, half the
            bytes of bfloat16, with the checkpoint's scales or 1.0).
        snapshot_every: tokens between two snapshots of a request's recurrent state, for models that have one (Mamba-2, gated
            delta net). Others are kept where a prompt or an output ends, and where a request leaves a cached prefix.
        snapshot_share: fraction of the memory for caches that such snapshots may take, beside the states of running requests.
        kv_cache_memory_bytes: size of the KV cache of one rank in bytes; None takes what `max_num_seqs` requests of
            `max_model_len` tokens need, at most what is free: on a GPU what `gpu_memory_utilization` leaves, on a CPU
            half of the memory that is free after loading.
        gpu_memory_utilization: fraction of a GPU's memory that may be in use at the largest step, by weights, caches,
            activations and other processes.
        num_redundant_experts: number of physical experts beyond the logical ones.
        topology: location of the ranks: a file of NVLink domains, nodes and failure domains, or "nvl72", "nvl36" or
            "hgx8"; None: detected. Tokens go to replicas in their own NVLink domain if that keeps the load even, and
            EPLB places the first two replicas of an expert in different failure domains.
        eplb_step_interval: number of steps after which the expert-parallel load balancer (EPLB) checks whether moving
            experts between ranks pays, and moves them while requests are served; 0: never.
        all2all_backend: exchange of tokens between ranks: "auto" (the fastest that these ranks can use), "reference"
            (torch's all_to_all_single), "nccl" (grouped send and receive) or "nvlink" (stores into the memory of other
            ranks: over NVLink between GPUs, in shared memory between CPU ranks of one machine).
        all2all_table: file of measured times, written by `expertwire bench all-to-all --sweep`, by which "auto" chooses
            the backend; None: by the topology and the size of steps.
        dispatch_dtype: type of activations sent to experts: "fp8" (half the bytes of bfloat16, a scale for 128 numbers)
            or "auto" (that of activations, but fp8 between GPUs when all experts are in fp8 blocks, which changes no
            result). On a CPU "fp8" rounds the inputs of experts and saves no time.
        enable_two_batch_overlap: compute every step as two micro-batches, so that one computes while tokens of the other
            are exchanged. Results have the same bits; it pays for large steps and slow exchanges.
        threads_per_rank: number of threads of a CPU rank; None divides the cores among the ranks.
        seed: seed from which the seeds of requests without one are drawn.
        start_timeout_s: seconds within which the ranks must be ready.
        step_timeout_s: seconds within which a step must end; the error names the ranks that did not answer.
    """

    model: str
    revision: str | None = None
    served_model_name: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    ep_size: int = 1
    launcher: Literal["auto", "local", "ray"] = "auto"
    ray_address: str | None = None
    load_format: Literal["auto", "dummy", "mock"] = "auto"
    mock_step_time_s: float = 0.0
    generation_config: Literal["auto", "model", "none"] = "auto"
    quantization: Literal["fp8", "int4", "mxfp4"] | None = None
    numerics: Literal["invariant", "fast"] = "invariant"
    attention_backend: Literal["triton", "flashinfer"] = "triton"
    max_model_len: int | None = None
    max_num_batched_tokens: int | None = None
    max_num_seqs: int = 256
    max_queued_requests: int = 4096
    max_queued_requests_per_tenant: int | None = None
    chunked_prefill_size: int | None = None
    scheduling_policy: PolicyName = "fcfs"
    aging: float | None = None
    tenant_quotas: Mapping[str, TenantQuota] | None = None
    default_tenant_quota: TenantQuota | None = None
    enable_prefix_caching: bool = True
    block_size: int = 16
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    snapshot_every: int = 512
    snapshot_share: float = 0.2
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    num_redundant_experts: int = 0
    topology: str | None = None
    eplb_step_interval: int = 0
    all2all_backend: Literal["auto", Backend] = "auto"
    all2all_table: str | None = None
    dispatch_dtype: Literal["auto", "fp8"] = "auto"
    enable_two_batch_overlap: bool = False
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
            if field != "seed" and (hint is int or (int in get_args(hint) and value is not None)):
                _check_int(field, value, 0 if field in _MAY_BE_ZERO else 1)
        share = self.gpu_memory_utilization
        if not is_number(share) or not 0 < share <= 1:
            raise ValueError(f"gpu_memory_utilization must be a number in (0, 1], got {share!r}")
        if not is_number(self.snapshot_share) or not 0 <= self.snapshot_share <= 0.5:
            raise ValueError(f"snapshot_share must be a number in [0, 0.5], got {self.snapshot_share!r}")
        if not is_int(self.snapshot_every) or self.snapshot_every < 1:
            raise ValueError(f"snapshot_every must be an integer >= 1, got {self.snapshot_every!r}")
        self._check_mock()
        for field in ("revision", "served_model_name"):
            if (name := getattr(self, field)) is not None and (not isinstance(name, str) or not name):
                raise ValueError(f"{field} must be a string that is not empty, or None, got {name!r}")
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
            raise ValueError(f'ray_address must be "host:port", "auto", "local" or None, got {self.ray_address!r}')
        if self.ray_address is not None and self.launcher == "local":
            raise ValueError(
                f"ray_address {self.ray_address!r} has no effect with launcher 'local'; use 'ray' or 'auto'"
            )

    def _check_mock(self) -> None:
        seconds = self.mock_step_time_s
        if not is_number(seconds) or not 0 <= seconds <= 1:
            raise ValueError(f"mock_step_time_s must be a number of seconds in [0, 1], got {seconds!r}")
        if seconds and self.load_format != "mock":
            raise ValueError(
                f"mock_step_time_s {seconds} has no effect with load_format {self.load_format!r}; use 'mock'"
            )

    def _check_ranks(self) -> None:
        for field in ("eplb_step_interval", "enable_two_batch_overlap"):
            if (value := getattr(self, field)) and self.ep_size == 1:
                raise ValueError(
                    f"{field} {value} has no effect with ep_size 1, which exchanges no tokens; use more ranks"
                )
        if self.topology is not None and not isinstance(self.topology, str):
            raise ValueError(
                f"topology must be the path of a file, 'nvl72', 'nvl36', 'hgx8' or None, got {self.topology!r}"
            )
        if self.topology is not None and not self.num_redundant_experts:
            raise ValueError(
                f"topology {self.topology!r} has no effect with num_redundant_experts 0, which gives no expert a replica"
            )

    def _check_attention(self) -> None:
        if self.attention_backend == "triton":
            return
        for field, allowed in (("numerics", "fast"), ("enable_two_batch_overlap", False), ("kv_cache_dtype", "auto")):
            if (value := getattr(self, field)) != allowed:
                raise ValueError(
                    f"attention_backend {self.attention_backend!r} needs {field} {allowed!r}, got {value!r}; "
                    "or use 'triton'"
                )
        if self.device == "cpu":
            raise ValueError(f"attention_backend must be 'triton' with device 'cpu', got {self.attention_backend!r}")

    def _check_table(self) -> None:
        if self.all2all_table is None:
            return
        if not isinstance(self.all2all_table, str):
            raise ValueError(f"all2all_table must be the path of a file or None, got {self.all2all_table!r}")
        if self.all2all_backend != "auto":
            raise ValueError(f"all2all_table has no effect with all2all_backend {self.all2all_backend!r}; use 'auto'")
        if self.ep_size == 1:
            raise ValueError("all2all_table has no effect with ep_size 1, which exchanges no tokens; use more ranks")

    def _check_policy(self) -> None:
        make_policy(self.scheduling_policy, aging=self.aging)
        if self.tenant_quotas is not None:
            if not isinstance(self.tenant_quotas, Mapping):
                raise ValueError(
                    f"tenant_quotas must be a dictionary of names and TenantQuotas, got {self.tenant_quotas!r}"
                )
            object.__setattr__(self, "tenant_quotas", dict(self.tenant_quotas))
            for tenant in self.tenant_quotas:
                check_name("tenant_quotas: a tenant", tenant)
        quotas = {f"tenant_quotas[{tenant!r}]": quota for tenant, quota in (self.tenant_quotas or {}).items()}
        if self.default_tenant_quota is not None:
            quotas["default_tenant_quota"] = self.default_tenant_quota
        for field, quota in quotas.items():
            if not isinstance(quota, TenantQuota):
                raise ValueError(f"{field} must be a TenantQuota, got {quota!r}")
            if quota.weight != 1 and self.scheduling_policy != "fair":
                raise ValueError(
                    f"{field}.weight {quota.weight} has no effect with scheduling_policy {self.scheduling_policy!r}; use 'fair'"
                )

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a step."""
        return 2 if self.enable_two_batch_overlap else 1

    def on(self, device: str) -> EngineConfig:
        """Return these options with the defaults of a device, such as "cpu" or "cuda:0"."""
        if self.max_num_batched_tokens is not None:
            return self
        return dataclasses.replace(self, max_num_batched_tokens=2048 if device == "cpu" else 8192)

    @property
    def step_tokens(self) -> int:
        """Maximum number of tokens in one step of one rank, once the device is known."""
        assert self.max_num_batched_tokens is not None, "max_num_batched_tokens depends on the device: see `on`"
        return self.max_num_batched_tokens

    @property
    def micro_batch_tokens(self) -> int:
        """Maximum number of tokens in one micro-batch of one rank."""
        return -(-self.step_tokens // self.num_micro_batches)

    def resolved_launcher(self) -> Literal["local", "ray"]:
        """Return the launcher, with "auto" resolved."""
        if self.launcher == "auto":
            return "ray" if self.ray_address is not None else "local"
        return self.launcher


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """The model and the limits of a running engine, as its clients see them."""

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
    all_to_all: str  # the backend and the reason for it; "" with one rank
    block_size: int
    cache_tokens: int  # capacity of one rank's caches
    cache_blocks: dict[str, int]  # of one rank, by cache
    cache_bytes: dict[str, int]  # of one rank, by cache
    max_num_seqs: int  # of one rank
    max_queued_requests: int
    max_queued_requests_per_tenant: int
    seed: int
    # Of requests that leave them unset; fields that are not here have the defaults of `SamplingParams`.
    default_sampling_params: dict[str, Any] = dataclasses.field(default_factory=dict)
    num_labels: int = 0  # of a model that scores texts; 0: it generates

    def sampling_params(self, **fields: Any) -> SamplingParams:
        """Return sampling parameters with the model's defaults where `fields` does not set them.

        Raises:
            ValueError: names the field and the values it allows.
        """
        return SamplingParams(**{**self.default_sampling_params, **fields})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelInfo:
        return cls(**{**values, "eos_token_ids": tuple(values["eos_token_ids"])})


def check_name(field: str, value: object) -> None:
    """Check that `value` can be the name of a tenant or a salt. Names are hashed as UTF-8, so lone surrogates are refused.

    Raises:
        ValueError: it cannot.
    """
    if (
        isinstance(value, str)
        and len(value) <= _MAX_NAME
        and not any("\ud800" <= letter <= "\udfff" for letter in value)
    ):
        return
    got = f"{len(value)} characters" if isinstance(value, str) and len(value) > _MAX_NAME else repr(value)
    raise ValueError(f"{field} must be a string of at most {_MAX_NAME} characters of valid Unicode, got {got:.100}")


def _choices(hint: Any) -> list[Any]:
    """Return the values that a `Literal`, or an optional one, allows; nothing for other types."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    named = [choice for member in members if get_origin(member) is Literal for choice in get_args(member)]
    return [*([None] if named and NoneType in members else []), *named]


def _check_int(field: str, value: object, low: int) -> None:
    if not is_int(value) or value < low:
        raise ValueError(f"{field} must be an integer >= {low}, got {value!r}")
