"""What of the options about tokens that travel between ranks can be refused before anything starts."""

from __future__ import annotations

from expertwire.comm import topology_table
from expertwire.engine.config import EngineConfig
from expertwire.engine.model_config import ModelConfig
from expertwire.engine.quantization import expert_format

_GROUP = 128  # numbers with a scale


def check(config: EngineConfig, model: ModelConfig) -> None:
    """Whether they fit the model, and the table the ranks.

    Raises:
        ValueError: they do not.
    """
    for field in ("all_to_all_table", "dispatch_dtype", "two_batch_overlap"):
        value = getattr(config, field)
        if value not in (None, "auto", False) and not any(model.sparse_layers):
            raise ValueError(f"{field} has no effect: {model.architecture} has no experts; got {value!r}")
    if config.dispatch_dtype == "fp8" and model.hidden_size % _GROUP:
        raise ValueError(
            f"dispatch_dtype 'fp8' needs rows of a multiple of {_GROUP} numbers; {model.architecture} has {model.hidden_size}"
        )
    if config.dispatch_dtype == "fp8" and config.device == "cuda":
        check_packed(config, model)
    if config.all_to_all_table is not None:
        table = topology_table.read(config.all_to_all_table)
        table.check(config.ep_size, table.device if config.device == "auto" else config.device)


def check_packed(config: EngineConfig, model: ModelConfig) -> None:
    """Whether experts on a GPU read rows that come quantised.

    Raises:
        ValueError: they do not.
    """
    format = expert_format(model, config.quantize)
    if (format, model.dtype) != ("fp8_block", "bfloat16"):
        raise ValueError(
            "dispatch_dtype 'fp8' needs, on a GPU, experts of format fp8_block (quantize 'fp8', or a checkpoint's) and dtype "
            f"bfloat16; these are {format} and {model.dtype}"
        )
