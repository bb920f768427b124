"""The paged attention kernel in the interpreter: the reference's values, and the same bits however a query is scheduled."""

import dataclasses

import pytest
import torch
from helpers.paged_scenes import BATCHES, TOLERANCE, scene

from expertwire.kernels.gpu import attention as gpu
from expertwire.kernels.gpu.device import Device
from expertwire.kernels.gpu.split_kv import split_grid
from expertwire.kernels.ops import attention
from expertwire.kernels.ops.attention import AttentionOptions

DEVICE = Device(arch=90, num_sms=1)
CONFIG = gpu.AttentionTileConfig(decode_rows=16, rows=16, keys=16, split=32, least_warps=4, num_stages=2)


def run(q, k, v, seqs, device=DEVICE, config=CONFIG, **options):
    """Run attention into a poisoned output."""
    out = torch.full_like(q, float("nan")).contiguous()
    return gpu.attend(q, k, v, seqs, AttentionOptions(**options), device=device, out=out, config=config)


def check(batch, dtype, *, scale=None, window=0, chunk=0, sinks_H=None, config=CONFIG, **shapes):
    q, k, v, host, device = scene(batch, dtype, **shapes)
    options = {"scale": scale, "window": window, "chunk": chunk, "sinks_H": sinks_H}
    rows = host.cu_seqlens_q[-1]
    expected = attention.reference(q[:rows], k.nan_to_num(), v.nan_to_num(), host, AttentionOptions(**options))
    actual = run(q, k, v, device, config=config, **options)
    torch.testing.assert_close(actual[:rows], expected, **TOLERANCE[dtype])
    assert actual[rows:].isnan().all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_reference(name, dtype):
    check(BATCHES[name], dtype)


@pytest.mark.parametrize("heads", [1, 4, 8, 16, 20], ids="group {}".format)
def test_groups(heads):
    check([(1, 40), (7, 40)], torch.float32, heads=2 * heads)


@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("block", [4, 16, 64])
def test_head_and_block_sizes(dim, block):
    check([(1, 33), (1, 63), (18, 65)], torch.float32, dim=dim, block=block)


@pytest.mark.parametrize("window", [1, 15, 16, 17, 33, 1000])
def test_windows(window):
    check([(1, 16), (1, 48), (1, 65), (1, 96), (20, 66)], torch.float32, window=window)


@pytest.mark.parametrize("chunk", [1, 16, 24, 64, 1000])
def test_chunks(chunk):
    check([(1, 16), (1, 48), (1, 65), (1, 97), (20, 66)], torch.float32, chunk=chunk)
    check([(1, 97), (40, 66)], torch.float32, chunk=chunk, window=20)


def test_windows_skip_tiles():
    """Blocks before a window may hold anything, NaN in the values too."""
    q, k, v, host, device = scene([(1, 96), (4, 96)], torch.float32)
    expected = attention.reference(q, k.nan_to_num(), v.nan_to_num(), host, AttentionOptions(window=16))
    for table in host.block_table:
        v[table[:3]] = float("nan")
    torch.testing.assert_close(run(q, k, v, device, window=16), expected, **TOLERANCE[torch.float32])


def test_reference_is_the_masked_softmax():
    """Compare with a softmax over one more logit, the sink's, without a value."""
    q, k, v, host, _ = scene([(9, 30)], torch.float32, kv_heads=4)
    sinks_H = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    k_LHd, v_LHd = (cache[host.block_table[0]].flatten(0, 1)[:30].double() for cache in (k, v))
    logits = torch.einsum("thd,lhd->thl", q.double(), k_LHd) * 0.3
    distance = torch.arange(21, 30)[:, None, None] - torch.arange(30)
    logits = logits.masked_fill((distance < 0) | (distance >= 7), float("-inf"))
    weights = torch.cat((logits, sinks_H.double().expand(9, 4)[..., None]), -1).softmax(-1)[..., :-1]
    actual = attention.reference(q, k, v, host, AttentionOptions(scale=0.3, window=7, sinks_H=sinks_H))
    torch.testing.assert_close(actual.double(), torch.einsum("thl,lhd->thd", weights, v_LHd), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [0, 20])
def test_sinks(window):
    sinks_H = torch.tensor([-40.0, 0.0, 3.0, 40.0])
    check([(1, 1), (1, 70), (9, 40)], torch.float32, sinks_H=sinks_H, window=window, scale=0.5)


def test_sequences_without_queries():
    check([(1, 40), (1, 3)], torch.float32, unused=3)
    check([(1, 40), (9, 40)], torch.float32, unused=3)


@pytest.mark.parametrize("unused", [0, 3])
@pytest.mark.parametrize("name", BATCHES)
def test_bounds_change_no_bit(name, unused):
    """Use the bounds of a captured step: upper limits, whatever the step has."""
    q, k, v, _, seqs = scene(BATCHES[name], torch.float16, unused=unused)
    bounds = {"max_decodes": len(seqs.seq_lens), "max_prefills": len(seqs.seq_lens), "max_prefill_tokens": len(q)}
    loose = dataclasses.replace(seqs, **bounds, max_seq_len=300, max_prefill_len=300)
    for sms in (1, 7):
        found = run(q, k, v, loose, device=Device(arch=90, num_sms=sms))
        torch.testing.assert_close(found, run(q, k, v, seqs), rtol=0, atol=0, equal_nan=True)


def test_chosen_tiles():
    config = gpu.tile_config(head_dim=32, element_size=4, arch=90)
    check([(1, 70), (20, 70)], torch.float32, config=dataclasses.replace(config, split=64))


def test_queries_apart():
    """Use queries as they lie in the output of the projection, between keys and values."""
    q, k, v, host, device = scene([(1, 20), (6, 20)], torch.float32)
    apart = torch.cat((q, torch.full_like(q, float("nan"))), 1)[:, : q.shape[1]]
    torch.testing.assert_close(run(apart, k, v, device), attention.reference(q, k.nan_to_num(), v.nan_to_num(), host))


@pytest.mark.parametrize(("window", "sinks"), [(0, False), (20, True)])
@pytest.mark.parametrize("dtype", [torch.float16])
def test_bits_do_not_depend_on_the_schedule(dtype, window, sinks):
    """Compute the last queries of a sequence in a prefill, in a chunk and as decodes, alone or in a
    batch, with any split.
    """
    length, num = 71, 20
    sinks_H = torch.linspace(-1, 2, 4) if sinks else None
    q, k, v, _, seqs = scene([(length, length)], dtype)
    whole = run(q, k, v, seqs, window=window, sinks_H=sinks_H)

    def again(starts, sizes, **options):
        """These stretches of the sequence as sequences of one step, sharing their cache."""
        rows = torch.cat([torch.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)])
        ends = [start + size for start, size in zip(starts, sizes, strict=True)]
        table = seqs.block_table.expand(len(sizes), -1).contiguous()
        step = attention.describe(sizes, ends, table, options.pop("max_seq_len", length))
        return run(q[rows], k, v, step, window=window, sinks_H=sinks_H, **options), whole[rows]

    for actual, expected in (
        again([length - num], [num]),
        again([length - 1], [1]),
        again([31, 32, 70], [1] * 3),
        again([3, 64, 10, 60], [1, 1, 7, 11], max_seq_len=1000),
        again([5, 63, 12], [1, 1, 20], config=dataclasses.replace(CONFIG, decode_rows=64, rows=32)),
    ):
        assert torch.equal(actual, expected)


def test_the_grid_is_enough_for_however_many_decodes_there_are():
    device, num_splits = Device(arch=90, num_sms=132), 128
    for bound in (1, 4, 1024, 10**6):
        wanted, grid = split_grid(device, bound, num_splits, is_decode=True, num_kv=4)
        assert wanted == 2 * 132
        assert grid <= bound + wanted
        for row_blocks in {1, 2, 3, bound // 2, bound} & set(range(1, bound + 1)):
            shares = max(1, min(-(-wanted // row_blocks), num_splits))
            assert row_blocks * shares <= grid
            assert shares == num_splits or row_blocks * shares >= wanted


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_keys_and_splits_follow_the_shape_alone(head_dim, element_size):
    chosen = [
        gpu.tile_config(head_dim=head_dim, element_size=element_size, arch=90, invariant=mode) for mode in (True, False)
    ]
    assert len({(config.keys, config.split) for config in chosen}) == 1
    assert chosen[0].split % chosen[0].keys == 0
    assert chosen[0].decode_rows == chosen[0].rows == 64
