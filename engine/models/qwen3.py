"""Qwen3 dense: norms on query and key heads, one MLP a layer."""

from __future__ import annotations

from expertwire.engine.decoder import Decoder


class Qwen3(Decoder):
    """`Qwen3ForCausalLM`."""
