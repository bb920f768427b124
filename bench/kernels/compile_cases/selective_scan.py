"""Compile cases of Mamba's selective scan.

D width of the rows (the channels), N numbers of the state for each.
"""

from __future__ import annotations

import torch

from expertwire.bench.kernels.compile_check import Case
from expertwire.kernels.gpu import selective_scan
from expertwire.kernels.gpu.dependent_launch import PDL

_EVERY = 512  # positions of an interval
# Channels, numbers of a channel's state, rank of dt.
_MODELS = {"phi-4-mini-flash": (5120, 16, 160)}


def cases() -> list[Case]:
    return [
        Case(
            name=f"selective_scan.{form} {name}",
            kernel=selective_scan.selective_scan_kernel,
            args={
                **dict.fromkeys(("x", "dt", "B", "C", "y"), torch.bfloat16),
                **dict.fromkeys(("A", "skip", "dt_bias", "state_cache"), torch.float32),
                **dict.fromkeys(("num_decodes", "cu_seqlens_q", "seq_lens", "block_table"), torch.int32),
                "num_sequences": 7,
                "every": _EVERY,
                "stride_x": width,
                "stride_dt": width,
                "stride_write": rank + 2 * size,
                "stride_read": rank + 2 * size,
                "table_width": 33,
            },
            constexprs=selective_scan.constexprs(width, size, _EVERY, decodes),
            num_warps=selective_scan.NUM_WARPS,
            blocks_per_sm=blocks,
            wide=False,  # a program's rows are short
            options={**selective_scan.OPTIONS, **PDL},
        )
        for name, (width, size, rank) in _MODELS.items()
        for form, decodes, blocks in (("decode", True, 16), ("prefill", False, 8))
    ]
