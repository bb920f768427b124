"""GLM-4.7-Flash and GLM-5: DeepSeek-V3 and V3.2 of other sizes, without scaling of positions."""

from __future__ import annotations

from expertwire.engine.config.fields import Fields
from expertwire.engine.models import deepseek
from expertwire.engine.models.family import Family
from expertwire.engine.models.model_config import Layer


def _sparse_layers(fields: Fields) -> tuple[Layer, ...]:
    """The indexer rotates interleaved pairs, as attention does."""
    num_layers = fields.integer("num_hidden_layers")
    kinds = fields.listed("indexer_types", num_layers, "full", "shared") or ["full"]
    if "shared" in kinds or fields.integer("index_topk_freq", default=1) > 1 or fields.get("index_topk_pattern"):
        raise ValueError(
            f"{fields.file}: {fields.path}indexer_types must be 'full' for every layer, index_topk_freq 1 and index_topk_pattern "
            "null: layers that share an indexer's choice are not supported"
        )
    attention = deepseek.with_indexer(deepseek.latent_attention(fields), fields, interleaved=True)
    return deepseek.stack(fields, attention, deepseek.biased_experts(fields))


GLM4_MOE_LITE = Family(layers=deepseek.v3_layers, skipped=deepseek.predictors)
GLM_MOE_DSA = Family(layers=_sparse_layers, skipped=deepseek.predictors)
