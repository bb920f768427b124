"""OLMoE: norms over the whole of query and key; the chosen experts' weights are not brought to a sum of one."""

from __future__ import annotations

from expertwire.engine import readers
from expertwire.engine.family import Family
from expertwire.engine.fields import Fields
from expertwire.engine.model_config import Attention, Layer, Moe


def layers(fields: Fields) -> tuple[Layer, ...]:
    if fields.get("clip_qkv") is not None:
        raise ValueError(f"{fields.file}: {fields.path}clip_qkv must be null, got {fields.get('clip_qkv')!r}")
    num_heads, num_kv_heads = readers.heads(fields)
    head_dim, bias = readers.head_dim(fields, default=None), fields.flag("attention_bias", default=False)
    attention = Attention(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope=readers.rope(fields, head_dim),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm="row",
    )
    moe = Moe(
        **readers.experts(fields, "num_experts", "num_local_experts"),
        size=fields.integer("intermediate_size"),
        renormalize=fields.flag("norm_topk_prob"),
    )
    return (Layer(attention=attention, mlp=moe),) * fields.integer("num_hidden_layers")


OLMOE = Family(layers=layers)
