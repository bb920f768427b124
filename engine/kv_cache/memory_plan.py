"""Memory of a GPU: estimated before anything is loaded, and measured before the KV caches are sized.

The estimate follows from the model and the options alone, so that an engine that cannot fit is refused in its first second, with
a table, instead of running out of memory minutes later. The caches are not sized by it: a rank that has loaded its weights runs
its largest step and sees how much memory that takes (`measured`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from expertwire.comm.all_to_all import fp8 as a2a_fp8
from expertwire.comm.all_to_all.symmetric_buffer import BufferLayout
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.models.model_config import MlpConfig, ModelConfig
from expertwire.engine.runner.cuda_graphs import GraphSize, graph_sizes
from expertwire.engine.runner.exchange import Exchange, absent_group, exchange_of
from expertwire.moe.eplb.placement import place

# What CUDA's context, loaded kernels and NCCL take beside torch; an assumption until a GPU says otherwise.
_CONTEXT_BYTES = 1 << 30
# Of a captured graph beside the memory that all graphs share: its nodes. Likewise.
_GRAPH_BYTES = 16 << 20
_LESS = "use more ranks (ep_size), a lower max_num_batched_tokens or max_num_seqs, or a higher gpu_memory_utilization (at most 1)"


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes that one rank takes of its GPU.

    Attributes:
        total: memory of the GPU.
        utilization: share of it that the engine may take.
        weights: by kind, as they are multiplied.
        symmetric_buffers: memory of the all-to-all that other ranks write to.
        slots: tokens and block tables of running requests, tables of positions.
        activations: of the largest step.
        graphs: CUDA graphs.
        context: what is not torch's.
    """

    total: int
    utilization: float
    weights: Mapping[str, int]
    symmetric_buffers: int
    slots: int
    activations: int
    graphs: int
    context: int = _CONTEXT_BYTES

    @property
    def taken(self) -> int:
        """Return the bytes of everything but the caches."""
        return (
            sum(self.weights.values())
            + self.symmetric_buffers
            + self.slots
            + self.activations
            + self.graphs
            + self.context
        )

    @property
    def caches(self) -> int:
        """Return the bytes that are left for the caches; negative if the rest does not fit."""
        return int(self.total * self.utilization) - self.taken

    def rows(self) -> list[tuple[str, int]]:
        """Return names and bytes of all parts, and what is left for caches."""
        return [
            *((f"weights: {kind}", nbytes) for kind, nbytes in self.weights.items()),
            ("weights", sum(self.weights.values())),
            ("all-to-all buffers", self.symmetric_buffers),
            ("tables of requests", self.slots),
            ("activations", self.activations),
            ("CUDA graphs", self.graphs),
            ("CUDA context", self.context),
            ("left for caches", self.caches),
        ]

    def __str__(self) -> str:
        rows = "\n".join(f"  {name:<28}{nbytes / 1e9:>9.2f} GB" for name, nbytes in self.rows())
        return f"{self.utilization:g} of {self.total / 1e9:.2f} GB a GPU (estimated):\n{rows}"


def estimate(
    config: EngineConfig, model: ModelConfig, weights: Mapping[str, int], max_model_len: int, total: int
) -> MemoryPlan:
    """Return the plan of the rank that holds most.

    Args:
        config: whose `max_num_batched_tokens` is decided.
        weights: bytes by kind (`memory.held_bytes`).
        max_model_len: of one request.
        total: memory of a GPU.
    """
    specs = model.cache_specs()
    table = -(-max_model_len // config.block_size) * len(specs) + max_model_len + 1
    sizes, num_ranks = _graphs(config, model), config.ep_size
    largest = max(sizes, key=lambda size: (size.num_tokens, size.max_others))
    graphs = _activations(config, model, largest.num_tokens, largest.num_tokens + (num_ranks - 1) * largest.max_others)
    tokens = config.micro_batch_tokens
    return MemoryPlan(
        total=total,
        utilization=config.gpu_memory_utilization,
        weights=weights,
        symmetric_buffers=_symmetric_buffer_bytes(config, model),
        slots=4 * config.max_num_seqs * table,
        activations=_activations(config, model, tokens, num_ranks * _exchange_tokens(config, model))
        + 2 * 4 * config.max_num_seqs * model.vocab_size,  # logits, and a copy that is bent
        graphs=graphs + len(sizes) * _GRAPH_BYTES,
    )


def check(plan: MemoryPlan) -> None:
    """Refuse what cannot fit.

    Raises:
        ValueError: nothing would be left for the caches; with the table.
    """
    if plan.caches <= 0:
        raise ValueError(
            f"the model does not fit into gpu_memory_utilization {plan.utilization:g} of the GPU's memory; {_LESS}; {plan}"
        )


def _symmetric_buffer_bytes(config: EngineConfig, model: ModelConfig) -> int:
    """Return the bytes of a rank's symmetric buffers, one for each micro-batch, with the NVLink all-to-all."""
    exchange = _exchange(config, model)
    if exchange is None:
        return 0
    packed = a2a_fp8.packed(exchange.spec) if exchange.is_fp8 else exchange.spec
    return config.num_micro_batches * BufferLayout.of(packed).nbytes


def _exchange_tokens(config: EngineConfig, model: ModelConfig) -> int:
    """Return the most tokens of a rank that one exchange takes."""
    exchange = _exchange(config, model)
    return config.micro_batch_tokens if exchange is None else exchange.spec.max_tokens


def _exchange(config: EngineConfig, model: ModelConfig) -> Exchange | None:
    """Return the worker's exchange, with a group that has a size and nothing else; None if no all-to-all is needed."""
    if config.ep_size == 1 or not any(model.sparse_layers):
        return None
    offsets = place(model.num_experts, config.ep_size, config.num_redundant_experts).rank_offsets
    return exchange_of(config, model, absent_group(0, config.ep_size), offsets, on_gpu=True)


def _graphs(config: EngineConfig, model: ModelConfig) -> list[GraphSize]:
    """Return the steps to capture, as `ModelRunner.graph_sizes` does."""
    tokens = _exchange_tokens(config, model) * config.num_micro_batches
    return graph_sizes(tokens, config.max_num_seqs, config.ep_size)


def _activations(config: EngineConfig, model: ModelConfig, num_tokens: int, of_all: int) -> int:
    """Return the bytes of the layer that takes most: residual stream, its norm, and what the layer makes of them.

    Args:
        num_tokens: of this rank.
        of_all: of all ranks, in one exchange.
    """
    itemsize = getattr(torch, model.dtype).itemsize
    stream = 3 * num_tokens * model.hidden_size
    mixer = num_tokens * max(layer.mixer.activation_size for layer in model.layers if layer.mixer is not None)
    mlp = 0
    for layer in model.layers:
        if layer.mlp is None:
            continue
        if isinstance(layer.mlp, MlpConfig):
            mlp = max(mlp, 3 * num_tokens * layer.mlp.intermediate_size)
            continue
        here = -(-(layer.mlp.num_experts + config.num_redundant_experts) // config.ep_size)
        rows = of_all * min(layer.mlp.top_k, here)
        # What the experts make of rows, with a copy for narrow numbers, their results, and the shared expert's.
        routed = rows * (2 * layer.mlp.intermediate_size + model.dispatch_size)
        mlp = max(mlp, routed + 3 * num_tokens * layer.mlp.shared_intermediate_size)
    return itemsize * (stream + max(mixer, mlp))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Memory of a GPU that was taken by the largest steps, in bytes.

    Attributes:
        total: memory of the GPU.
        peak: peak of torch's allocator at the largest step: weights, tables and activations.
        largest_graph: what the largest captured step takes beside weights and tables; CUDA graphs need as much of their own.
        outside: memory outside of torch's allocator: CUDA's context, NCCL, symmetric memory, other processes.
    """

    total: int
    peak: int
    largest_graph: int
    outside: int

    def room(self, config: EngineConfig, model: ModelConfig) -> int:
        """Return the bytes that are left for the caches, with room for the graphs that are still to be captured.

        Raises:
            ValueError: there are none, or fewer than `kv_cache_memory_bytes`.
        """
        graphs = self.largest_graph + len(_graphs(config, model)) * _GRAPH_BYTES
        left = int(self.total * config.gpu_memory_utilization) - self.peak - self.outside - graphs
        if left < (config.kv_cache_memory_bytes or 1):
            wanted = (
                f"kv_cache_memory_bytes is {config.kv_cache_memory_bytes}, but " if config.kv_cache_memory_bytes else ""
            )
            raise ValueError(
                f"{wanted}{left / 1e9:.2f} GB are left for caches: gpu_memory_utilization {config.gpu_memory_utilization:g} of "
                f"{self.total / 1e9:.2f} GB, less {self.peak / 1e9:.2f} at the largest step, {self.outside / 1e9:.2f} outside of "
                f"torch and {graphs / 1e9:.2f} for CUDA graphs; {_LESS}"
            )
        return left


def measured(device: str, run_largest_graph: Callable[[], None], run_peak: Callable[[], None]) -> Measured:
    """Run the largest steps and return the memory that they took."""

    def peak_of(run: Callable[[], None]) -> int:
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)

    before = torch.cuda.memory_allocated(device)
    largest_graph = peak_of(run_largest_graph) - before
    peak = peak_of(run_peak)
    free, total = torch.cuda.mem_get_info(device)
    outside = total - free - torch.cuda.memory_reserved(device)
    return Measured(total=total, peak=peak, largest_graph=largest_graph, outside=outside)
