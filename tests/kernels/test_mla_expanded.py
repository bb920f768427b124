"""Latent attention of prompts with keys and values made again: the absorbed form's numbers, but for rounding."""

import pytest
import torch
from test_mla_ops import OPS, SCALE, TOLERANCE, scene

from expertwire.kernels.ops import attention, mla

RANK, ROTATED, PLAIN = 32, 16, 24
BATCH = [(1, 30), (1, 5), (1, 64), (5, 5), (40, 64), (30, 41)]


@pytest.mark.parametrize("value_size", [8, PLAIN + ROTATED, 64])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_both_forms_agree(name, dtype, value_size):
    ops, heads = OPS[name], 3
    _, cache, seqs = scene(BATCH, dtype, heads=heads, width=RANK + ROTATED)
    generator = torch.Generator().manual_seed(1)
    num_tokens = sum(num for num, _ in BATCH)
    q_THd = torch.randn(num_tokens, heads, PLAIN + ROTATED, generator=generator).to(dtype)
    up_HmC = (torch.randn(heads, PLAIN + value_size, RANK, generator=generator) * RANK**-0.5).to(dtype)
    key_HnC, value_HvC = up_HmC.float().split((PLAIN, value_size), 1)
    absorbed_THC = torch.einsum("thn,hnc->thc", q_THd[..., :PLAIN].float(), key_HnC)
    q_THl = torch.cat((absorbed_THC, q_THd[..., PLAIN:].float()), 2)
    latent_THC = mla.reference(q_THl, cache.float(), seqs, rank=RANK, scale=SCALE)
    expected = torch.einsum("thc,hvc->thv", latent_THC, value_HvC)
    found = mla.attend_expanded(
        q_THd[seqs.max_decodes :],
        cache.nan_to_num(),  # hidden keys enter with weight zero, so they must be finite
        attention.prefills(seqs, seqs.max_decodes),
        rank=RANK,
        scale=SCALE,
        expand=ops.linear(up_HmC.flatten(0, 1), dtype=dtype),
        attend=ops.attend,
    )
    # Keys and values are rounded, which the absorbed form's are not.
    slack = 1 if dtype == torch.float32 else 4
    torch.testing.assert_close(
        found.float(), expected[seqs.max_decodes :], **{k: slack * v for k, v in TOLERANCE[dtype].items()}
    )


def test_a_step_is_cut_into_decodes_and_prefills():
    _, _, seqs = scene(BATCH, torch.float32)
    num = attention.known_decodes(seqs, 78)
    decodes, prefills = attention.decodes(seqs, num), attention.prefills(seqs, num)
    assert decodes.num_sequences == decodes.max_decodes == decodes.num_decodes == 3
    assert decodes.cu_seqlens_q.tolist() == [0, 1, 2, 3]
    assert prefills.num_sequences == 3
    assert prefills.max_decodes == prefills.num_decodes == 0
    assert prefills.cu_seqlens_q.tolist() == [0, 5, 45, 75]
    assert prefills.seq_lens.tolist() == [5, 64, 41]


def test_a_device_step_is_cut_only_where_the_host_knows_its_decodes():
    seqs = attention.describe([1, 1, 4], [9, 8, 7], torch.zeros(3, 1, dtype=torch.int32))
    assert attention.known_decodes(seqs, 6) == 2
    assert attention.known_decodes(seqs, 8) is None, "two rows of padding"
    decodes, prefills = attention.decodes(seqs, 2), attention.prefills(seqs, 2)
    assert (decodes.max_decodes, decodes.max_prefills, decodes.max_prefill_tokens) == (2, 0, 0)
    assert (prefills.max_decodes, prefills.max_prefills, prefills.max_prefill_tokens) == (0, 1, 4)
    assert prefills.num_decodes.tolist() == [0]
    assert prefills.max_seq_len == 7


@pytest.mark.parametrize(
    ("batch", "worth"),
    [
        ([(1, 9)], False),
        ([(64, 64)], True),
        ([(1, 500), (64, 128)], True),
        ([(64, 129)], False),
        ([(4, 4), (64, 64)], True),
        ([(2, 2)] * 9 + [(64, 64)], False),
    ],
)
def test_it_pays_where_keys_are_few(batch, worth):
    _, _, seqs = scene(batch, torch.float32)
    num_tokens = sum(num for num, _ in batch) - seqs.max_decodes
    prefills = attention.prefills(seqs, seqs.max_decodes)
    assert mla.is_worth_expanding(prefills, num_tokens) == worth
