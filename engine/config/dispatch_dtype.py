"""What of the options about tokens that travel between ranks can be refused before anything starts."""

from __future__ import annotations

from pathlib import Path

from expertwire.comm.topology import backend_times
from expertwire.engine.config.engine import EngineConfig
from expertwire.engine.loader.quantization import expert_format
from expertwire.engine.models.model_config import ITEM_SIZES, ModelConfig, Moe

_GROUP = 128  # numbers with a scale


def check(config: EngineConfig, model: ModelConfig) -> None:
    """Whether they fit the model, and the table the ranks.

    Raises:
        ValueError: they do not.
    """
    for field in ("all2all_table", "dispatch_dtype", "enable_two_batch_overlap"):
        value = getattr(config, field)
        if value not in (None, "auto", False) and not any(model.sparse_layers):
            raise ValueError(f"{field} has no effect: {model.architecture} has no experts; got {value!r}")
    if config.dispatch_dtype == "fp8" and model.hidden_size % _GROUP:
        raise ValueError(
            f"dispatch_dtype 'fp8' needs rows of a multiple of {_GROUP} numbers; {model.architecture} has {model.hidden_size}"
        )
    sends_fp8(config, model, on_gpu=config.device == "cuda")
    if config.all2all_table is not None:
        table = backend_times.read(config.all2all_table)
        table.check(config.ep_size, table.device if config.device == "auto" else config.device)


def sends_fp8(config: EngineConfig, model: ModelConfig, *, on_gpu: bool) -> bool:
    """Whether rows go out quantised: as asked for, and by itself between GPUs whose experts would quantise them just so.

    Raises:
        ValueError: it was asked for, and the experts do not read such rows.
    """
    asked = config.dispatch_dtype == "fp8"
    if not on_gpu or (config.ep_size == 1 and not asked):
        return asked
    obstacle = _obstacle(config, model)
    if asked and obstacle:
        raise ValueError(f"dispatch_dtype 'fp8' needs, on a GPU, {obstacle}")
    return not obstacle


def exchange_tokens(config: EngineConfig, model: ModelConfig, num_ranks: int, *, fp8: bool) -> int:
    """Return how many tokens of a rank an exchange takes between GPUs: those of a step, or as many as there is memory for at
    worst, so that larger steps take several."""
    from expertwire.comm.all_to_all import symmetric_buffer as arena
    from expertwire.kernels.ops.quantize import packed_bytes

    size = max(moe.size for layer in model.layers if isinstance(moe := layer.mlp, Moe))
    item = ITEM_SIZES[model.dtype]
    quantised = expert_format(model, config.quantization) in ("fp8_block", "fp8_row")
    return arena.exchange_tokens(
        config.part_tokens,
        num_ranks=num_ranks,
        experts=-(-(model.num_experts + config.num_redundant_experts) // num_ranks),
        top_k=model.top_k,
        row_bytes=packed_bytes(model.hidden_size) if fp8 else model.hidden_size * item,
        home_bytes=model.hidden_size * item,
        expert_bytes=size * (item + quantised),
        budget=arena.EXCHANGE_BYTES // config.num_parts,
    )


def on_gpus(*, graph_safe: bool, fp8: bool) -> str:
    """What is said of how tokens travel between GPUs."""
    steps = (
        "small steps replay CUDA graphs"
        if graph_safe
        else "the all-to-all's host counts rows, so that no step can replay a CUDA graph"
    )
    rows = "rows go out in fp8, as the experts would quantise them" if fp8 else "rows go out as they are"
    return f"{rows}; {steps}"


def _obstacle(config: EngineConfig, model: ModelConfig) -> str:
    """What experts would have to be to read rows in fp8; "" if they do."""
    if model.hidden_size % _GROUP:
        return f"rows of a multiple of {_GROUP} numbers; {model.architecture} has {model.hidden_size}"
    format = expert_format(model, config.quantization)
    if (format, model.dtype) != ("fp8_block", "bfloat16"):
        return (
            "experts of format fp8_block (quantization 'fp8', or a checkpoint's) and dtype bfloat16; these are "
            f"{format} and {model.dtype}"
        )
    plain = _plain_layers(config, model) if config.quantization is None else []
    if plain:
        layers = f"layer{'s' * (len(plain) > 1)} {', '.join(map(str, plain))}"
        return f"experts of format fp8_block in every layer, and the checkpoint has those of {layers} as they are"
    return ""


def _plain_layers(config: EngineConfig, model: ModelConfig) -> list[int]:
    """Whose experts the checkpoint has unquantised: by its tensors, or where there are none by its config."""
    from expertwire.engine.loader.checkpoint import Checkpoint  # slow to import, and for this alone
    from expertwire.engine.loader.layout import Layout
    from expertwire.engine.models.declaration import declare
    from expertwire.engine.models.registry import FAMILIES

    dummy = config.load_format == "dummy" or not any(Path(config.model).glob("*.safetensors*"))
    layout = Layout(stored=None if dummy else Checkpoint(config.model).tensors, quantization=model.quantization)
    declare(model, FAMILIES[model.architecture].names, layout, lambda i: ())
    return [i for i, sparse in enumerate(model.sparse_layers) if sparse and f"layers.{i}.w13" in layout.specs]
