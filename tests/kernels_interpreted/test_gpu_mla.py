"""Latent attention and the writing of its cache in the interpreter, against the reference and between schedules."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from helpers.count_launches import launches

from expertwire.kernels.gpu import mla as gpu
from expertwire.kernels.gpu import mla_rope_and_cache, prefill
from expertwire.kernels.gpu.device import Device
from expertwire.kernels.ops import attention, mla, rotary
from expertwire.kernels.ops.variants import Rope

DEVICE = Device(arch=90, num_sms=1)
CONFIG = gpu.MlaTileConfig(rows=16, keys=16, split=32, column_splits=1, num_warps=4, num_stages=2)
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float16: {"rtol": 2e-3, "atol": 2e-3}}
RANK, ROTATED, BLOCK, SCALE, EPS = 32, 16, 16, 0.2, 1e-6

# (queries, known tokens) of each sequence; single queries first.
BATCHES = {
    "one token": [(1, 1)],
    "around a block": [(1, BLOCK - 1), (1, BLOCK), (1, BLOCK + 1)],
    "several splits": [(1, 32), (1, 33), (1, 65)],
    "whole prefill": [(17, 17)],
    "mixed": [(1, 8), (1, 65), (3, 3), (9, 30), (5, 64)],
}


def scene(batch, dtype, *, heads=4, unused=0, seed=0):
    """Queries, a cache poisoned wherever no sequence has stored, the description for the reference and that for a GPU."""
    generator = torch.Generator().manual_seed(seed)
    nums, lengths = (np.array([s[i] for s in batch], np.int64) for i in (0, 1))
    counts = -(-lengths // BLOCK)
    ids = 1 + np.random.default_rng(seed).permutation(int(counts.sum()))
    tables = np.zeros((len(batch), int(counts.max())), np.int32)
    q = torch.randn(int(nums.sum()) + unused, heads, RANK + ROTATED, generator=generator).to(dtype)
    cache = torch.full((len(ids) + 1, BLOCK, RANK + ROTATED), float("nan"), dtype=dtype)
    for b, count in enumerate(counts):
        tables[b, :count], ids = ids[:count], ids[count:]
        for position in range(lengths[b]):
            row = torch.randn(RANK + ROTATED, generator=generator)
            cache[tables[b, position // BLOCK], position % BLOCK] = row.to(dtype)
    host = attention.describe(nums, lengths, torch.from_numpy(tables))
    rows, known = [*nums.tolist(), *[0] * unused], [*lengths.tolist(), *[0] * unused]
    padded = torch.from_numpy(np.pad(tables, ((0, unused), (0, 0))))
    device = attention.describe(rows, known, padded)
    return q, cache, host, device


def run(q, cache, seqs, **options):
    """Run attention into a poisoned output."""
    out = q.new_full((*q.shape[:2], RANK), float("nan"))
    return gpu.attend(q, cache, seqs, DEVICE, rank=RANK, scale=SCALE, out=out, **{"config": CONFIG, **options})


def check(batch, dtype, *, heads=4, unused=0, chosen=None, **options):
    q, cache, host, device = scene(batch, dtype, heads=heads, unused=unused)
    rows = host.cu_seqlens_q[-1]
    expected = mla.reference(q[:rows], cache.nan_to_num(), host, rank=RANK, scale=SCALE, chosen=chosen)
    if chosen is not None:
        chosen = torch.nn.functional.pad(chosen, (0, 0, 0, unused))
    actual = run(q, cache, device, chosen=chosen, **options)
    torch.testing.assert_close(actual[:rows], expected, **TOLERANCE[dtype])
    assert actual[rows:].isnan().all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_reference(name, dtype):
    check(BATCHES[name], dtype)


@pytest.mark.parametrize("heads", [1, 5, 16, 32], ids="{} heads".format)
def test_heads(heads):
    check([(1, 40), (3, 40)], torch.float32, heads=heads)


def choice(batch, top_k):
    """Return random positions that each query may see, itself among them, ascending and followed by -1."""
    generator, rows = np.random.default_rng(0), []
    for num, length in batch:
        for position in range(length - num, length):
            few = generator.permutation(position)[: min(top_k, position + 1) - 1]
            rows.append(
                np.pad(np.append(np.sort(few), position), (0, max(0, top_k - len(few) - 1)), constant_values=-1)
            )
    return torch.from_numpy(np.stack(rows))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("top_k", [1, 20, 100])
def test_chosen_positions(dtype, top_k):
    batch = [(1, 8), (1, 65), (3, 3), (9, 30)]
    check(batch, dtype, chosen=choice(batch, top_k), unused=2)


def test_choosing_all_positions_changes_no_bit():
    batch = [(1, 8), (1, 65), (9, 30)]
    q, cache, _, device = scene(batch, torch.float32)
    assert torch.equal(run(q, cache, device, chosen=choice(batch, 70)), run(q, cache, device))


def test_sequences_without_queries():
    check([(1, 40), (1, 3)], torch.float32, unused=3)
    check([(1, 40), (9, 40)], torch.float32, unused=3)


@pytest.mark.parametrize("workspace_rows", [1 << 18, 2 * 4 * 10])
@pytest.mark.parametrize("name", BATCHES)
def test_bounds_change_no_bit(name, workspace_rows):
    """Use the bounds of a captured step: upper limits, whatever the step has."""
    q, cache, _, seqs = scene(BATCHES[name], torch.float16, unused=2)
    bounds = {"max_decodes": len(seqs.seq_lens), "max_prefills": len(seqs.seq_lens), "max_prefill_tokens": len(q)}
    exact = dataclasses.replace(seqs, max_seq_len=300)  # as many tokens fit the workspace
    loose = dataclasses.replace(exact, **bounds, max_prefill_len=300)
    found, expected = (run(q, cache, each, workspace_rows=workspace_rows) for each in (loose, exact))
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_two_column_splits():
    check([(1, 65), (5, 40)], torch.float32, config=dataclasses.replace(CONFIG, column_splits=2))


def test_small_workspace():
    """Use several launches, which cut sequences into pieces."""
    check([(1, 40), (1, 33), (1, 2), (9, 40), (7, 20)], torch.float32, workspace_rows=2 * 4 * 2)


def test_launches_do_not_depend_on_the_longest_sequence():
    """Use a captured step's bounds and a workspace for all splits of 4 tokens, which once took 3 pairs of launches."""
    batch = [(1, 8)] * 5 + [(3, 40)]
    q, cache, _, seqs = scene(batch, torch.float32)
    expected = run(q, cache, seqs)
    seqs = dataclasses.replace(seqs, max_seq_len=163840, max_prefill_len=163840)
    for chosen in (None, choice(batch, 40)):
        with launches() as counts:
            found = run(q, cache, seqs, chosen=chosen, workspace_rows=4 * 4 * 163840 // CONFIG.split)
        del counts["new_full"]  # the test's own
        assert counts == {"plan_kernel": 1, "mla_kernel": 1, "merge_kernel": 1}
        assert torch.equal(found, expected)


def test_bits_do_not_depend_on_the_schedule():
    """Compute the last queries of a sequence in a prefill, in a chunk and as decodes, alone or in a batch."""
    length = 67
    q, cache, _, seqs = scene([(length, length)], torch.float16)
    whole = run(q, cache, seqs)

    def again(starts, sizes, **options):
        rows = torch.cat([torch.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)])
        table = seqs.block_table.expand(len(sizes), -1).contiguous()
        ends = [sum(pair) for pair in zip(starts, sizes, strict=True)]
        step = attention.describe(sizes, ends, table, options.pop("max_seq_len", length))
        return run(q[rows], cache, step, **options), whole[rows]

    for actual, expected in (
        again([50], [17]),
        again([66], [1]),
        again([31, 32, 66], [1] * 3, max_seq_len=1000),
        again([3, 64, 60], [1, 1, 7], workspace_rows=32),
        again([63, 52], [1, 11], config=dataclasses.replace(CONFIG, rows=32)),
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("arch", [90, 100])
def test_splits_hold_whole_tiles(arch, element_size):
    config = gpu.tile_config(rank=512, element_size=element_size, arch=arch)
    assert config.split % config.keys == 0


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("tokens", "heads"), [(0, 3), (1, 1), (7, 3), (5, 8), (4, 20)])
def test_rope_and_cache(tokens, heads, dtype, interleaved):
    """Use queries and outputs that are parts of longer rows, and a token that is not stored."""
    generator = torch.Generator().manual_seed(tokens)
    q = torch.randn(tokens, heads, 24 + ROTATED, generator=generator).to(dtype)[:, :, 24:]
    kv = torch.randn(tokens, 40 + RANK + ROTATED, generator=generator).to(dtype)[:, 40:]
    norm = torch.rand(RANK, generator=generator).to(dtype) + 0.5
    positions = torch.randint(0, 50, (tokens,), generator=generator)
    slots = torch.randperm(3 * BLOCK, generator=generator)[:tokens]
    slots[1:2] = -1
    tables = rotary.tables(50, Rope(theta=1e4, size=ROTATED), "cpu")
    stored = slots >= 0
    caches = [torch.full((3, BLOCK, RANK + ROTATED), float("nan"), dtype=dtype) for _ in range(2)]
    every = rotary.RopeInputs(tables, positions, slots.clamp(min=0), interleaved)
    expected = mla.rope_and_cache(q, kv, norm, EPS, every, caches[0].clone())
    kept = rotary.RopeInputs(tables, positions[stored], slots[stored], interleaved)
    mla.rope_and_cache(q[stored], kv[stored], norm, EPS, kept, caches[0])
    absorbed = torch.full((tokens, heads, RANK + ROTATED), float("nan"), dtype=dtype)
    out = absorbed[:, :, RANK:]
    inputs = rotary.RopeInputs(tables, positions, slots, interleaved)
    mla_rope_and_cache.rope_and_cache(q, kv, norm, EPS, inputs, caches[1], out=out)
    torch.testing.assert_close(out, expected, **TOLERANCE[dtype])
    torch.testing.assert_close(caches[1], caches[0], **TOLERANCE[dtype], equal_nan=True)
    assert absorbed[:, :, :RANK].isnan().all()


def test_chosen_tiles():
    check([(1, 70), (3, 70)], torch.float32, config=gpu.tile_config(rank=RANK, element_size=4, arch=100))


def test_prefills_in_expanded_form():
    """Use keys of 24 + 16 numbers and values of 20."""
    q, cache, host, device = scene(BATCHES["mixed"], torch.float32, unused=2)
    generator = torch.Generator().manual_seed(1)
    up_HmC = torch.randn(4, 24 + 20, RANK, generator=generator) * RANK**-0.5
    q_THd = torch.cat((torch.randn(len(q), 4, 24, generator=generator), q[..., RANK:]), 2)
    q_THl = torch.cat((torch.einsum("thn,hnc->thc", q_THd[..., :24], up_HmC[:, :24]), q[..., RANK:]), 2)
    rows, num = host.cu_seqlens_q[-1], host.num_decodes
    latent_THC = mla.reference(q_THl[:rows], cache, host, rank=RANK, scale=SCALE)
    expected = torch.einsum("thc,hvc->thv", latent_THC, up_HmC[:, 24:])[num:]
    prefills = attention.prefills(device, num)
    assert mla.is_worth_expanding(prefills, rows - num) == (3 * 64 <= 2 * (3 + 9 + 5))
    found = mla.attend_expanded(
        q_THd[num:],
        cache,
        prefills,
        rank=RANK,
        scale=SCALE,
        expand=lambda x_XC: x_XC @ up_HmC.flatten(0, 1).T,
        attend=partial(prefill.attend, device=DEVICE),
        narrow_values=True,
    )
    torch.testing.assert_close(found[: rows - num], expected, rtol=1e-5, atol=1e-5)
