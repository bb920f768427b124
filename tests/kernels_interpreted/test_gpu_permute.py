"""The order of routed rows against its reference: counts, stability, places that no row takes."""

import pytest
import torch

from expertwire.kernels.gpu import grouped_gemm_tiles
from expertwire.kernels.gpu import permute as gpu
from expertwire.kernels.ops import permute


def check(ids, num_experts, num_valid=None, format=None):
    """Compare with the reference and return the number of rows."""
    done = gpu.permute(ids, num_experts, num_valid, format=format)
    tokens = format and grouped_gemm_tiles.token_tile(format, ids.numel(), num_experts)
    expected = permute.reference(ids, num_experts, num_valid, token_tile=tokens)
    for name in ("expert_offsets", "row_index_N", "home_N"):
        assert getattr(done, name).dtype == torch.int32
        assert getattr(done, name).tolist() == getattr(expected, name).tolist(), name
    if format is None:
        assert done.tile_map is None
    else:
        same_tiles(done.tile_map, expected.tile_map)
    return int(expected.expert_offsets[-1])


def same_tiles(found, expected):
    num_tiles = int(expected.first_tile[-1])
    assert found.token_tile == expected.token_tile
    assert found.first_tile.tolist() == expected.first_tile.tolist()
    assert found.tile_expert[:num_tiles].tolist() == expected.tile_expert[:num_tiles].tolist()
    assert len(found.tile_expert) == len(expected.tile_expert)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fill memory that a kernel fails to write with a number that is no row."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(-12345))


@pytest.fixture(params=["one launch", "counted"])
def _regime(request, monkeypatch):
    if request.param == "counted":
        monkeypatch.setattr(gpu, "_ONE_LAUNCH", 0)


@pytest.mark.usefixtures("_regime")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"),
    [(0, 2, 3), (1, 1, 1), (1, 8, 16), (7, 3, 5), (64, 2, 8), (43, 3, 40), (1025, 4, 3), (1366, 3, 2)],
)
def test_random_choices(tokens, top_k, experts, dtype):
    generator = torch.Generator().manual_seed(tokens)
    check(torch.randint(-1, experts, (tokens, top_k), generator=generator, dtype=dtype), experts)


@pytest.mark.usefixtures("_regime")
@pytest.mark.parametrize("value", [-1, 0, 2, 4, 5])
def test_one_expert_takes_everything(value):
    """-1 and 5 are none of the five experts."""
    check(torch.full((300, 4), value), 5)


@pytest.mark.usefixtures("_regime")
@pytest.mark.parametrize("tokens", [1023, 1024, 1025, 2049])
def test_at_the_ends_of_chunks(tokens):
    check(torch.arange(4 * tokens).view(tokens, 4) % 3, 3)


def test_ids_without_columns_or_with_a_view_are_refused():
    with pytest.raises(AssertionError, match="strides"):
        gpu.permute(torch.zeros(4, 6, dtype=torch.int64)[:, :2], 3)


@pytest.mark.usefixtures("_regime")
@pytest.mark.parametrize("valid", [0, 1, 43, 700, 1366])
def test_tokens_that_only_fill_up_reach_no_expert(valid):
    ids = torch.arange(3 * 1366).view(1366, 3) % 5
    assert check(ids, 5, torch.tensor([valid], dtype=torch.int32), "dense") == 3 * valid


@pytest.mark.usefixtures("_regime")
@pytest.mark.parametrize("counts", [[0, 0, 0], [16, 17, 15, 0], [0, 129 * 16, 0], [1] * 40, [0] * 130 + [1]], ids=sum)
def test_rows_are_cut_into_tiles(counts, monkeypatch):
    """Use even and uneven experts, and more tiles of an expert than are written at a time."""
    for module in (gpu, grouped_gemm_tiles):
        monkeypatch.setattr(module, "token_tile", lambda *_: 16)
    ids = torch.repeat_interleave(torch.tensor(counts))[:, None]
    assert check(ids, len(counts), format="dense") == sum(counts)
