"""GLM-4.7-Flash and GLM-5: DeepSeek-V3 and V3.2 with other sizes and without rope scaling."""

from __future__ import annotations

from expertwire.engine.models import deepseek
from expertwire.engine.models.hf_config import HfConfig
from expertwire.engine.models.model_config import LayerConfig, ModelFamily


def _sparse_layers(hf: HfConfig) -> tuple[LayerConfig, ...]:
    """Return GLM-5's layers; the indexer's rotary embedding is interleaved, as attention's."""
    num_layers = hf.integer("num_hidden_layers")
    kinds = hf.choices("indexer_types", num_layers, "full", "shared") or ["full"]
    if "shared" in kinds or hf.integer("index_topk_freq", default=1) > 1 or hf.get("index_topk_pattern"):
        raise hf.error(
            "indexer_types must be 'full' for every layer, index_topk_freq 1 and index_topk_pattern "
            "null: layers that share an indexer's choice are not supported"
        )
    attention = deepseek.with_indexer(deepseek.latent_attention(hf), hf, interleaved=True)
    return deepseek.stack(hf, attention, deepseek.biased_experts(hf))


GLM4_MOE_LITE = ModelFamily(layers=deepseek.v3_layers, mtp_field=deepseek.MTP_FIELD)
GLM_MOE_DSA = ModelFamily(layers=_sparse_layers, mtp_field=deepseek.MTP_FIELD)
