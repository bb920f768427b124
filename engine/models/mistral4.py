"""The text model of Mistral Small 4: latent attention with queries scaled by position, experts with a shared one."""

from __future__ import annotations

from expertwire.engine.models import config_readers, deepseek
from expertwire.engine.models.hf_config import HfConfig
from expertwire.engine.models.model_config import LayerConfig, ModelFamily


def layers(hf: HfConfig) -> tuple[LayerConfig, ...]:
    attention = deepseek.latent_attention(hf, query_scaling=config_readers.query_scaling(hf))
    renormalize = hf.flag("norm_topk_prob")
    moe = deepseek.experts(hf, "num_local_experts", by="two_best", renormalize=renormalize)
    return deepseek.stack(hf, attention, moe)


MISTRAL4 = ModelFamily(layers=layers)
