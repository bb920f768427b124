"""Fake of FlashInfer where there is no GPU: its paged wrappers by their documentation (0.7.2.post1), strict, computed by
our references. Every call is bound to the real signatures (`flashinfer_signatures`); what is forbidden is an AssertionError.

It differs in the dtypes and sizes that it takes: those of the interpreter's tests, which FlashInfer has no kernels for.
"""

import sys
from dataclasses import dataclass, replace
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

from expertwire.kernels.ops import attention, mla
from helpers.flashinfer_signatures import signature


def bound(name, *args, **kwargs):
    """Return the arguments by name, without defaults, whose values the table does not know."""
    return signature(name).bind(*args, **kwargs).arguments


def is_indptr(tensor, batch=None):
    assert tensor.dtype == torch.int32, tensor.dtype
    assert tensor.dim() == 1 and tensor[0] == 0 and (tensor.diff() >= 0).all(), tensor
    assert batch is None or len(tensor) == batch + 1, (len(tensor), batch)


def sequences(qo_indptr, kv_indptr, kv_indices, kv_lengths, page_size):
    """Return attention metadata from page tables."""
    batch = len(qo_indptr) - 1
    is_indptr(qo_indptr)
    is_indptr(kv_indptr, batch)
    assert kv_indices.dtype == torch.int32 and len(kv_indices) == kv_indptr[-1], (kv_indices, kv_indptr)
    counts = kv_indptr.diff()
    assert (counts >= 1).all() and ((kv_lengths + page_size - 1) // page_size == counts).all(), (kv_lengths, counts)
    assert (qo_indptr.diff() <= kv_lengths).all(), "causal: more queries than keys"
    table = torch.zeros(batch, int(counts.max()), dtype=torch.int32)
    for row, pages in zip(table, kv_indices.split(counts.tolist()), strict=True):
        row[: len(pages)] = pages
    described = attention.describe([2] * batch, kv_lengths, table)
    return replace(described, cu_seqlens_q=qo_indptr)


class Wrapper:
    """The common part of the wrappers; `plans` counts."""

    def __init__(self, *args, **kwargs):
        given = bound(f"{type(self).__name__}.__init__", *args, **kwargs)
        workspace = given.pop("float_workspace_buffer")
        assert workspace.dtype == torch.uint8 and workspace.data_ptr() % 16 == 0
        assert workspace.numel() >= 128 << 20, f"{workspace.numel()} bytes; 128 MiB are recommended"
        self.options, self.planned, self.plans = given, None, 0
        assert given.get("kv_layout", "NHD") == "NHD" and not given.get("use_cuda_graph", False)
        made.append(self)

    def _check_rows(self, q, out, width):
        rows = int(self.seqs.cu_seqlens_q[-1])
        assert q.shape[0] == rows, f"{q.shape[0]} rows, planned for {rows}"
        assert q.dtype == self.planned["q_data_type"] and q.is_contiguous()
        assert out.shape == (*q.shape[:2], width) and out.dtype == q.dtype and out.is_contiguous()

    def _plan_paged(self, qo_indptr, kv_indptr, kv_indices, last_page_len, given):
        assert last_page_len.dtype == torch.int32 and len(last_page_len) == len(kv_indptr) - 1
        page_size = given["page_size"]
        assert ((last_page_len >= 1) & (last_page_len <= page_size)).all(), last_page_len
        assert given["num_qo_heads"] % given["num_kv_heads"] == 0
        lengths = (kv_indptr.diff() - 1) * page_size + last_page_len
        self.seqs = sequences(qo_indptr, kv_indptr, kv_indices, lengths, page_size)
        self.planned, self.plans = given, self.plans + 1

    def _run_paged(self, dim, given):
        assert self.planned is not None, "run before plan"
        q, (k, v), out, planned = given.pop("q"), given.pop("paged_kv_cache"), given.pop("out"), self.planned
        assert not given, f"not known to the fake: {given}"
        self._check_rows(q, out, dim)
        assert q.shape[1:] == (planned["num_qo_heads"], dim), q.shape
        for cache in (k, v):
            assert cache.shape[1:] == (planned["page_size"], planned["num_kv_heads"], dim), cache.shape
            assert cache.dtype == planned["kv_data_type"] and cache.is_contiguous()
        assert self.seqs.block_table.max() < len(k)
        window = planned.get("window_left", -1) + 1
        options = attention.AttentionOptions(scale=planned["sm_scale"], window=window)
        out.copy_(attention.reference(q, k, v, self.seqs, options))
        return out


class BatchPrefillWithPagedKVCacheWrapper(Wrapper):
    def plan(self, *args, **kwargs):
        given = bound("BatchPrefillWithPagedKVCacheWrapper.plan", *args, **kwargs)
        table = [given.pop(name) for name in ("qo_indptr", "paged_kv_indptr", "paged_kv_indices")]
        assert given["causal"], "without a causal mask queries see later keys"
        self._plan_paged(*table, given.pop("paged_kv_last_page_len"), given)

    def run(self, *args, **kwargs):
        given = bound("BatchPrefillWithPagedKVCacheWrapper.run", *args, **kwargs)
        return self._run_paged(self.planned["head_dim_qk"], given)


class BatchDecodeWithPagedKVCacheWrapper(Wrapper):
    def plan(self, *args, **kwargs):
        assert len(args) == 7, "what follows page_size is deprecated by position"
        given = bound("BatchDecodeWithPagedKVCacheWrapper._plan_impl", *args, **kwargs)
        table = [given.pop(name) for name in ("indptr", "indices", "last_page_len")]
        group = given["num_qo_heads"] // given["num_kv_heads"]
        assert self.options.get("use_tensor_cores", False) or group in (1, 2, 3, 4, 8), f"group {group}"
        self._plan_paged(torch.arange(len(table[0]), dtype=torch.int32), *table, given)

    def run(self, *args, **kwargs):
        given = bound("BatchDecodeWithPagedKVCacheWrapper.run", *args, **kwargs)
        return self._run_paged(self.planned["head_dim"], given)


@dataclass(frozen=True)
class MLAPlanMetadata:
    table: dict

    @classmethod
    def csr(cls, *args, **kwargs):
        return cls(bound("MLAPlanMetadata.csr", *args, **kwargs))


class BatchMLAPagedAttentionWrapper(Wrapper):
    def plan(self, *args, **kwargs):
        assert not args, "positional arguments are deprecated"
        given = bound("BatchMLAPagedAttentionWrapper.plan", **kwargs)
        table = given.pop("metadata").table
        assert given["causal"] and given["query_layout"] == given["kv_cache_layout"] == "packed"
        lengths = table["kv_len_arr"]
        assert lengths.dtype == torch.int32
        names = "qo_indptr", "kv_indptr", "kv_indices"
        self.seqs = sequences(*(table[name] for name in names), lengths, given["page_size"])
        self.planned, self.plans = given, self.plans + 1

    def run(self, *args, **kwargs):
        assert not args, "positional arguments are deprecated"
        assert self.planned is not None, "run before plan"
        given = bound("BatchMLAPagedAttentionWrapper.run", **kwargs)
        q, cache, out, planned = given.pop("query"), given.pop("kv_cache"), given.pop("out"), self.planned
        assert not given, f"not known to the fake: {given}"
        rank = planned["head_dim_ckv"]
        self._check_rows(q, out, rank)
        width = rank + planned["head_dim_kpe"]
        assert q.shape[1:] == (planned["num_heads"], width), q.shape
        assert cache.shape[1:] == (planned["page_size"], width) and cache.dtype == planned["kv_data_type"]
        assert cache.is_contiguous() and self.seqs.block_table.max() < len(cache)
        out.copy_(mla.reference(q, cache, self.seqs, rank=rank, scale=planned["sm_scale"]))
        return out


made: list[Wrapper] = []


def install(monkeypatch):
    """Install the fake as if it were the package; return the list of the wrappers that are made."""
    api, of_mla = ModuleType("flashinfer"), ModuleType("flashinfer.mla")
    for module in (api, of_mla):
        module.__spec__ = ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    api.mla = of_mla
    for wrapper in (BatchPrefillWithPagedKVCacheWrapper, BatchDecodeWithPagedKVCacheWrapper):
        setattr(api, wrapper.__name__, wrapper)
    of_mla.BatchMLAPagedAttentionWrapper, of_mla.MLAPlanMetadata = BatchMLAPagedAttentionWrapper, MLAPlanMetadata
    made.clear()
    return made
