"""Symmetric memory by torch's contracts, over a strict fake: names, lifetimes, one rendezvous for all ranks."""

import gc
import inspect
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from helpers.fake_cuda import FakeCuda, OnCpu
from helpers.fake_nccl import FakeProcessGroupNCCL
from helpers.fake_symmetric_memory import FakeSymmetricMemory, IllegalAddress
from torch._C import _distributed_c10d

from expertwire.comm import symmetric_memory
from expertwire.comm.group import TorchGroup

NBYTES, RANKS = 4096, 3


@pytest.fixture
def torch_on_gpus(monkeypatch):
    """Replace torch's NCCL and symmetric memory for ranks that are threads."""
    memory = FakeSymmetricMemory()
    for module in (symmetric_memory, _distributed_c10d):
        monkeypatch.setattr(module, "_SymmetricMemory", memory, raising=False)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", FakeProcessGroupNCCL, raising=False)
    FakeCuda(RANKS).install(monkeypatch)


def on_ranks(function):
    """Return the results of `function(rank, store)` on every rank."""
    store = dist.HashStore()

    def run(rank):
        with OnCpu():
            return function(rank, store)

    with ThreadPoolExecutor(RANKS) as pool:
        return [future.result(30) for future in [pool.submit(run, rank) for rank in range(RANKS)]]


def joined(rank, store, device):
    torch.cuda.set_device(rank)
    return TorchGroup(store=store, rank=rank, size=RANKS, device=device, local_ip="127.0.0.1", timeout_s=20)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_rank_writes_into_every_other_until_the_group_is_closed(torch_on_gpus, device):
    """Also over gloo, which processes on one GPU use for the rendezvous. Buffers are zero before any rank writes."""

    def run(rank, store):
        group = joined(rank, store, device)
        memories = symmetric_memory.symmetric(group, NBYTES, torch.device("cuda", rank))
        assert not memories[rank].any()
        group.barrier()
        gc.collect()  # what nobody holds would go now
        for memory in memories:
            memory[16 * rank : 16 * rank + 16] = rank + 1
        group.barrier()
        found = memories[rank][: 16 * RANKS].tolist()
        view = memories[(rank + 1) % RANKS][5:]
        group.barrier()
        group.close()
        with pytest.raises(IllegalAddress):
            view.sum()
        return found

    for found in on_ranks(run):
        assert found == [1] * 16 + [2] * 16 + [3] * 16


def test_a_name_is_registered_for_as_long_as_the_group_lives(torch_on_gpus):
    def run(rank, store):
        group = joined(rank, store, "cuda")
        name = group.register()
        gc.collect()
        there = _distributed_c10d._resolve_process_group(name)
        assert (there.rank(), there.size()) == (rank, RANKS)
        del there
        group.close()
        with pytest.raises(RuntimeError, match="Could not resolve the process group"):
            _distributed_c10d._resolve_process_group(name)
        return name

    assert len(set(on_ranks(run))) == RANKS


def test_engines_of_one_process_have_memory_of_their_own(torch_on_gpus):
    def run(rank, store):
        groups = [joined(rank, dist.PrefixStore(name, store), "cpu") for name in "ab"]
        first, second = (symmetric_memory.symmetric(group, NBYTES, torch.device("cuda", rank)) for group in groups)
        groups[0].close()
        second[(rank + 1) % RANKS][rank] = 7
        groups[1].barrier()
        assert second[rank].count_nonzero() == 1
        with pytest.raises(IllegalAddress):
            first[rank].any()
        groups[1].close()

    on_ranks(run)


def test_two_ranks_on_one_gpu_are_refused_unless_they_may(torch_on_gpus, monkeypatch):
    def run(rank, store):
        group = joined(rank, store, "cpu")
        memories = symmetric_memory.symmetric(group, NBYTES, torch.device("cuda", 0))
        return len(memories)

    with pytest.raises(RuntimeError, match="overlapping devices"):
        on_ranks(run)
    monkeypatch.setattr(symmetric_memory, "_SymmetricMemory", FakeSymmetricMemory(shared_devices=True))
    assert on_ranks(run) == [RANKS] * RANKS


def test_another_kind_of_symmetric_memory_is_refused(torch_on_gpus, monkeypatch):
    """NVSHMEM's and NCCL's want a process group with a backend, which the registered one has not."""
    monkeypatch.setattr(symmetric_memory, "_SymmetricMemory", FakeSymmetricMemory(backend="NVSHMEM"))

    def run(rank, store):
        group = joined(rank, store, "cpu")
        with pytest.raises(ValueError, match="of kind 'CUDA', this process has 'NVSHMEM'; unset TORCH_SYMMMEM"):
            symmetric_memory.symmetric(group, NBYTES, torch.device("cuda", rank))
        group.close()

    on_ranks(run)


def test_the_fake_has_torchs_names_and_arguments():
    """All names and arguments that the fake replaces exist in torch."""
    real = _distributed_c10d._SymmetricMemory
    words = re.findall(r"(\w+):", real.empty_strided_p2p.__doc__)
    assert words == [*inspect.signature(FakeSymmetricMemory().empty_strided_p2p).parameters]
    assert re.findall(r"(\w+):", real.rendezvous.__doc__) == ["tensor", "group_name"]
    assert re.findall(r"(\w+):", real.get_backend.__doc__) == ["arg0"]
