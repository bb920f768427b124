"""FlashInfer's attention (`attention_backend="flashinfer"`): a thin wrapper over its paged wrappers.

The contract (flashinfer-python 0.7.2.post1, prefill.py, decode.py and mla/_batch_mla/_wrapper.py)
and its consequences:

- A wrapper is planned once and run by all layers that attend alike: the first layer of a step plans. A plan reads the lengths
  on the host (`.to("cpu")` in every `plan`), so a step waits for the one before it and cannot be captured: steps run eagerly.
- Page tables are ragged: `indptr` i32 [S + 1], `indices` i32 [pages], `last_page_len` i32 [S] in [1, page_size]. Caches [pages,
  page_size, G, d] are its layout NHD, which is ours.
- `window_left` is the number of positions a query sees besides its own.
- Sinks, chunked positions, top-k positions and other head sizes are refused at start (`engine.config.validation`).

It has not run on a GPU: `first_contact` compares it with our kernels where there is one.

T tokens, H query heads, G key/value heads, d head size, c latent size, l = c + r, S sequences, W entries of a block table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertwire.kernels.ops.attention import PLAIN, AttentionMetadata, AttentionOptions, known_decodes

_WORKSPACE = 384 << 20  # bytes; 128 MiB are recommended for few heads
_TENSOR_CORES = 4  # query heads per key head from which decode uses tensor cores


@dataclass(frozen=True, kw_only=True)
class Pages:
    """Sequences as a plan takes them: i32, on the host except for the indices.

    rows: their rows in the step. qo_indptr: counted from the first of them.
    """

    rows: slice
    qo_indptr: Tensor
    kv_indptr: Tensor
    kv_indices: Tensor
    kv_lengths: Tensor
    last_page_len: Tensor


def pages(first_row: int, nums_S: Tensor, lengths_S: Tensor, table_SW: Tensor, page_size: int) -> Pages:
    """Return the pages of sequences with these numbers of queries and tokens (i32, on the host) and
    this block table.

    Their rows follow one another from `first_row` on.
    """
    counts_S = (lengths_S + page_size - 1) // page_size
    qo_indptr, kv_indptr = (torch.cat((counts[:1] * 0, counts.cumsum(0))).int() for counts in (nums_S, counts_S))
    sequence = torch.repeat_interleave(torch.arange(len(counts_S)), counts_S)
    page = torch.arange(len(sequence)) - kv_indptr[sequence]
    indices = table_SW.flatten()[(sequence * table_SW.shape[1] + page).to(table_SW.device)]
    return Pages(
        rows=slice(first_row, first_row + int(qo_indptr[-1])),
        qo_indptr=qo_indptr,
        kv_indptr=kv_indptr,
        kv_indices=indices.int(),
        kv_lengths=lengths_S.int(),
        last_page_len=(lengths_S - (counts_S - 1) * page_size).int(),
    )


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """The wrappers of one kind of layer in the step of `seqs`, one for each range of rows."""

    seqs: AttentionMetadata
    runs: tuple[tuple[slice, Any], ...]


class FlashInfer:
    """`kernels.ops.attention.reference` and `kernels.ops.mla.reference`, without sinks, chunks and top-k positions.

    Args:
        api: the module `flashinfer`.
        mla: the module `flashinfer.mla`.
        device: device of the tensors.
    """

    def __init__(self, api: Any, mla: Any, device: torch.device | str) -> None:
        self._api, self._mla = api, mla
        # Kernels follow one another in a stream, so all wrappers can share it; decode expects zeros at first.
        self._workspace = torch.zeros(_WORKSPACE, dtype=torch.uint8, device=device)
        self._wrappers: dict[tuple[Any, ...], Any] = {}
        self._planned: dict[tuple[Any, ...], _Planned] = {}

    def attend(
        self,
        q_THd: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        seqs: AttentionMetadata,
        options: AttentionOptions = PLAIN,
    ) -> Tensor:
        """Return [T, H, d] in q's dtype; rows that belong to no sequence are undefined. Caches are
        [blocks, s, G, d].
        """
        assert options.chunk == 0, f"chunk {options.chunk} is refused at start"
        assert options.sinks_H is None, "sinks are refused at start"
        assert options.kv_scales_2G is None, "fp8 caches are refused at start"
        num_heads, dim = q_THd.shape[1:]
        page_size, num_kv = k_cache.shape[1:3]
        sizes = num_heads, num_kv, dim, page_size
        planned = {
            "sm_scale": options.scale_for(dim),
            "window_left": options.window - 1 if options.window else -1,
            "q_data_type": q_THd.dtype,
            "kv_data_type": k_cache.dtype,
        }

        def plan(key: tuple[Any, ...], part: Pages, is_decode: bool) -> Any:
            table = part.kv_indptr, part.kv_indices, part.last_page_len
            if is_decode:
                tensor_cores = num_heads // num_kv >= _TENSOR_CORES
                wrapper = self._wrapper((*key, "decode"), self._decode, tensor_cores)
                wrapper.plan(*table, *sizes, **planned)
            else:
                wrapper = self._wrapper((*key, "prefill"), self._api.BatchPrefillWithPagedKVCacheWrapper)
                wrapper.plan(part.qo_indptr, *table, *sizes, causal=True, **planned)
            return wrapper

        out, q_THd = torch.empty_like(q_THd, memory_format=torch.contiguous_format), q_THd.contiguous()
        for rows, wrapper in self._plan((*sizes, *planned.values()), seqs, len(q_THd), page_size, plan):
            wrapper.run(q_THd[rows], (k_cache, v_cache), out=out[rows])
        return out

    def attend_latent(
        self,
        q_THl: Tensor,
        cache: Tensor,
        seqs: AttentionMetadata,
        *,
        rank: int,
        scale: float,
        chosen: Tensor | None = None,
        kv_scale: Tensor | None = None,
    ) -> Tensor:
        """Return [T, H, c] in q's dtype; rows that belong to no sequence are undefined. Cache [blocks, s, l]."""
        assert chosen is None, "top-k positions are refused at start"
        assert kv_scale is None, "fp8 caches are refused at start"
        num_heads, width = q_THl.shape[1:]
        page_size = cache.shape[1]
        options = {
            "num_heads": num_heads,
            "head_dim_ckv": rank,
            "head_dim_kpe": width - rank,
            "page_size": page_size,
            "causal": True,
            "sm_scale": scale,
            "q_data_type": q_THl.dtype,
            "kv_data_type": cache.dtype,
            "query_layout": "packed",
            "kv_cache_layout": "packed",
        }

        def plan(key: tuple[Any, ...], part: Pages, is_decode: bool) -> Any:
            wrapper = self._wrapper((*key, is_decode), self._mla.BatchMLAPagedAttentionWrapper)
            table = part.qo_indptr, part.kv_indptr, part.kv_indices, part.kv_lengths
            wrapper.plan(metadata=self._mla.MLAPlanMetadata.csr(*table), **options)
            return wrapper

        out, q_THl = q_THl.new_empty(*q_THl.shape[:2], rank), q_THl.contiguous()
        for rows, wrapper in self._plan(tuple(options.values()), seqs, len(q_THl), page_size, plan):
            wrapper.run(query=q_THl[rows], kv_cache=cache, out=out[rows])
        return out

    def _decode(self, workspace: Tensor, tensor_cores: bool) -> Any:
        return self._api.BatchDecodeWithPagedKVCacheWrapper(workspace, use_tensor_cores=tensor_cores)

    def _wrapper(self, key: tuple[Any, ...], make: Callable[..., Any], *args: Any) -> Any:
        if key not in self._wrappers:
            self._wrappers[key] = make(self._workspace, *args)
        return self._wrappers[key]

    def _plan(
        self,
        key: tuple[Any, ...],
        seqs: AttentionMetadata,
        num_tokens: int,
        page_size: int,
        plan: Callable[[tuple[Any, ...], Pages, bool], Any],
    ) -> tuple[tuple[slice, Any], ...]:
        """Plan layers of this kind, unless this step has done so: all layers get the same attention metadata."""
        if (planned := self._planned.get(key)) is None or planned.seqs is not seqs:
            parts = _parts(seqs, num_tokens, page_size)
            runs = tuple((part.rows, plan(key, part, is_decode)) for part, is_decode in parts)
            self._planned[key] = planned = _Planned(seqs=seqs, runs=runs)
        return planned.runs


def _parts(seqs: AttentionMetadata, num_tokens: int, page_size: int) -> list[tuple[Pages, bool]]:
    """Return the pages of the decodes and of the prefills, each with whether it is the former.

    A row that belongs to no sequence, as in warm-up, is treated as a sequence of one token.
    """
    known = known_decodes(seqs, num_tokens)
    num = int(seqs.num_decodes) if known is None else known
    cu_seqlens_q, lengths_S = seqs.cu_seqlens_q.cpu().long(), seqs.seq_lens.cpu().long().clamp(min=1)
    nums_S, table_SW = cu_seqlens_q.diff(), seqs.block_table
    found = []
    if num:
        found.append((pages(0, torch.ones(num, dtype=torch.int64), lengths_S[:num], table_SW[:num], page_size), True))
    if num_tokens > num:
        live = num + nums_S[num:].nonzero()[:, 0]
        live_nums = nums_S[live]
        if not len(live):
            live, live_nums = torch.tensor([0]), torch.tensor([1])
        live_table = table_SW[live.to(table_SW.device)]
        live_lengths = torch.maximum(lengths_S[live], live_nums)
        found.append((pages(num, live_nums, live_lengths, live_table, page_size), False))
    return found
