"""GLM-4.5 to GLM-5.

GLM-4.5, 4.5-Air, 4.6 and 4.7 have grouped-query attention with rotary embedding of half a head and biases of query, key and
value but not of the output, and DeepSeek-V3's experts. GLM-4.7-Flash and GLM-5 are DeepSeek-V3 and V3.2 with other sizes and
without rope scaling.
"""

from __future__ import annotations

from dataclasses import replace

from expertwire.engine.models import config_readers, deepseek
from expertwire.engine.models.hf_config import HfConfig
from expertwire.engine.models.model_config import LayerConfig, ModelFamily


def _glm4_layers(hf: HfConfig) -> tuple[LayerConfig, ...]:
    attention = replace(
        config_readers.attention(hf, partial=0.5),
        qk_norm="head" if hf.flag("use_qk_norm") else "none",
        qkv_bias=hf.flag("attention_bias"),
    )
    return deepseek.stack(hf, attention, deepseek.biased_experts(hf))


def _glm5_layers(hf: HfConfig) -> tuple[LayerConfig, ...]:
    """Return GLM-5's layers; the indexer's rotary embedding is interleaved, as attention's."""
    num_layers = hf.integer("num_hidden_layers")
    kinds = hf.choices("indexer_types", num_layers, "full", "shared") or ["full"]
    if "shared" in kinds or hf.integer("index_topk_freq", default=1) > 1 or hf.get("index_topk_pattern"):
        raise hf.error(
            "indexer_types must be 'full' for every layer, index_topk_freq 1 and index_topk_pattern null: layers that share "
            "an indexer's choice are not supported"
        )
    attention = deepseek.with_indexer(deepseek.latent_attention(hf), hf, interleaved=True)
    return deepseek.stack(hf, attention, deepseek.biased_experts(hf))


GLM4_MOE = ModelFamily(layers=_glm4_layers, mtp_field=deepseek.MTP_FIELD)
GLM4_MOE_LITE = ModelFamily(layers=deepseek.v3_layers, mtp_field=deepseek.MTP_FIELD)
GLM_MOE_DSA = ModelFamily(layers=_glm5_layers, mtp_field=deepseek.MTP_FIELD)
