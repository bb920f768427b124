"""The prefill kernel of `fast` numerics in the interpreter: the reference's values, for any number of splits."""

import dataclasses

import pytest
import torch
from helpers.paged_scenes import BATCHES, TOLERANCE, scene

from expertwire.kernels.gpu import attention as gpu_attention
from expertwire.kernels.gpu import prefill
from expertwire.kernels.gpu.device import Device
from expertwire.kernels.gpu.prefill_split_kv import num_splits
from expertwire.kernels.ops import attention
from expertwire.kernels.ops.attention import AttentionOptions

ONE, MANY = Device(arch=90, num_sms=1), Device(arch=90, num_sms=64)
CONFIG = prefill.PrefillTileConfig(rows=64, keys=32, min_split_keys=32, num_warps=4, num_stages=2, blocks_per_sm=1)


def check(batch, dtype, *, device=ONE, scale=None, window=0, chunk=0, sinks_H=None, config=CONFIG, **shapes):
    q, k, v, host, seqs = scene(batch, dtype, **shapes)
    options = AttentionOptions(scale=scale, window=window, chunk=chunk, sinks_H=sinks_H)
    rows = host.cu_seqlens_q[-1]
    expected = attention.reference(q[:rows], k.nan_to_num(), v.nan_to_num(), host, options)
    out = torch.full_like(q, float("nan")).contiguous()
    actual = prefill.attend(q, k, v, seqs, options, device=device, out=out, config=config)
    torch.testing.assert_close(actual[:rows], expected, **TOLERANCE[dtype])
    assert actual[rows:].isnan().all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_reference(name, dtype):
    check(BATCHES[name], dtype)


@pytest.mark.parametrize("name", ["chunk", "mixed"])
def test_split_kv(name):
    check(BATCHES[name], torch.float32, device=MANY)


@pytest.mark.parametrize("variant", [{"window": 20}, {"chunk": 24}, {"window": 20, "chunk": 40}], ids=str)
def test_split_kv_variants(variant):
    check([(9, 100), (3, 3), (40, 66)], torch.float32, device=MANY, sinks_H=torch.linspace(-1, 2, 4), **variant)


@pytest.mark.parametrize("heads", [1, 5, 40], ids="group {}".format)
def test_groups(heads):
    check([(1, 20), (7, 40)], torch.float32, heads=2 * heads)


@pytest.mark.parametrize(("dim", "block"), [(16, 4), (64, 64), (80, 16), (112, 16)])
def test_head_and_block_sizes(dim, block):
    check([(1, 33), (18, 65)], torch.float32, dim=dim, block=block)
    check([(18, 65)], torch.float32, dim=dim, block=block, device=MANY)


@pytest.mark.parametrize("window", [1, 17, 1000])
def test_windows(window):
    check([(1, 48), (20, 66), (40, 41)], torch.float32, window=window)


@pytest.mark.parametrize("chunk", [1, 24, 1000])
def test_chunks(chunk):
    check([(1, 48), (20, 66), (40, 41)], torch.float32, chunk=chunk)
    check([(40, 66)], torch.float32, chunk=chunk, window=20)


def test_keys_that_slid_out_of_a_window_may_be_anything():
    """Also within a tile."""
    q, k, v, host, seqs = scene([(4, 96)], torch.float32)
    expected = attention.reference(q, k.nan_to_num(), v.nan_to_num(), host, AttentionOptions(window=20))
    v[host.block_table[0, :4]] = float("nan")
    k[host.block_table[0, :4]] = float("nan")
    config = dataclasses.replace(CONFIG, keys=64)
    actual = prefill.attend(q, k, v, seqs, AttentionOptions(window=20), device=ONE, config=config)
    torch.testing.assert_close(actual, expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("window", [0, 20])
def test_sinks(window):
    sinks_H = torch.tensor([-40.0, 0.0, 3.0, 40.0])
    check([(1, 70), (9, 40)], torch.float32, sinks_H=sinks_H, window=window, scale=0.5)


@pytest.mark.parametrize("device", [ONE, MANY], ids=["whole", "shared out"])
def test_a_captured_step_knows_bounds_alone(device):
    """Use bounds with more decodes, prefills and tokens than the step has, and longer sequences."""
    q, k, v, host, seqs = scene([(1, 20), (9, 40), (5, 70)], torch.float32)
    bounds = {"max_decodes": len(q), "max_prefills": 7, "max_prefill_tokens": len(q)}
    lengths = {"max_seq_len": 80, "max_prefill_len": 80}
    actual = prefill.attend(q, k, v, dataclasses.replace(seqs, **bounds, **lengths), device=device, config=CONFIG)
    expected = attention.reference(q, k.nan_to_num(), v.nan_to_num(), host)
    torch.testing.assert_close(actual, expected, **TOLERANCE[torch.float32])


def test_sequences_without_queries():
    check([(1, 40), (9, 40)], torch.float32, unused=3)
    check([(1, 40)], torch.float32, unused=3)


@pytest.mark.parametrize(("dim", "value_dim"), [(24, 16), (48, 32), (16, 32)])
def test_values_of_another_size_than_keys(dim, value_dim):
    """Use the sizes of latent attention in expanded form."""
    q, k, v, host, seqs = scene([(9, 40), (20, 33)], torch.float32, dim=max(dim, value_dim), kv_heads=4)
    q, k, v = q[..., :dim].contiguous(), k[..., :dim].contiguous(), v[..., :value_dim].contiguous()
    width = max(dim, value_dim)
    wide = [torch.nn.functional.pad(x.nan_to_num(), (0, width - x.shape[-1])) for x in (q, k, v)]
    options = AttentionOptions(scale=0.3)
    expected = attention.reference(*wide, host, options)[..., :value_dim]
    actual = prefill.attend(q, k, v, seqs, options, device=MANY, config=CONFIG)
    torch.testing.assert_close(actual, expected, **TOLERANCE[torch.float32])


def test_queries_apart():
    """Use queries as they lie in the output of the projection, between keys and values."""
    q, k, v, host, seqs = scene([(1, 20), (6, 20)], torch.float32)
    apart = torch.cat((q, torch.full_like(q, float("nan"))), 1)[:, : q.shape[1]]
    actual = prefill.attend(apart, k, v, seqs, device=ONE, config=CONFIG)
    torch.testing.assert_close(actual, attention.reference(q, k.nan_to_num(), v.nan_to_num(), host))


def test_decodes_take_16_rows():
    """They run `attention`'s kernel with the tiles of `fast`."""
    q, k, v, _, seqs = scene([(1, 70), (1, 3)], torch.float16)
    out = torch.empty_like(q)
    gpu_attention.attend_decodes(q, k, v, seqs, device=ONE, out=out, invariant=False)
    assert torch.equal(prefill.attend(q, k, v, seqs, device=ONE), out)


def test_chosen_tiles():
    check([(20, 70)], torch.float32, config=prefill.tile_config(dim=32, value_dim=32, element_size=4, arch=90))


@pytest.mark.parametrize(
    ("programs", "most", "expected"),
    [(2048, 128, 1), (264, 128, 1), (128, 1, 1), (128, 128, 2), (16, 128, 15), (16, 8, 7), (140, 128, 5)],
)
def test_the_number_of_splits_follows_the_gpu(programs, most, expected):
    """264 is two programs on each of 132 multiprocessors."""
    assert num_splits(programs, 264, most) == expected
