"""Choice of the all-to-all backend, and refusals with the allowed alternatives."""

from dataclasses import replace

import pytest

from expertwire.comm.topology import topology
from expertwire.comm.topology.backend_choice import GROUPED_FROM_ROWS, BackendConditions, choose
from expertwire.comm.topology.topology import RankLocation, Topology


def ranks(domains, nodes=None):
    """Return a topology with a letter a rank for its domain, and for its node."""
    pairs = zip(domains, nodes or domains, strict=True)
    return Topology(name="t", locations=tuple(RankLocation(domain=d, node=n, failure_domain=n) for d, n in pairs))


RACK = BackendConditions(topology=topology.read("nvl72"), device="cuda", step_rows=GROUPED_FROM_ROWS, row_bytes=28672)
BOARDS = replace(RACK, topology=ranks("aabb"))
HOST = replace(RACK, topology=ranks("aaaa"), device="cpu")
HOSTS = replace(RACK, topology=ranks("ab"), device="cpu")


@pytest.mark.parametrize(
    ("here", "name", "why"),
    [
        (RACK, "nvlink", "all 72 ranks are in one NVLink domain"),
        (BOARDS, "nccl", "2 NVLink domains .*enough for grouped .*a row crosses to another domain once"),
        (replace(BOARDS, step_rows=GROUPED_FROM_ROWS - 1), "reference", "too few for grouped"),
        (HOST, "nvlink", "write into shared memory"),
        (
            replace(HOST, buffer_bytes=2_000_000, shared_bytes=1_500_000),
            "nccl",
            "do not fit into shared memory: they need 2000000 bytes, and /dev/shm has 1500000 free",
        ),
        (HOSTS, "nccl", "on 2 nodes and share no memory"),
        (replace(HOSTS, step_rows=1), "reference", "on 2 nodes"),
        (replace(RACK, topology=ranks("a")), "reference", "one rank"),
        (replace(RACK, gpus_shared=True, libraries=()), "nvlink", "one NVLink domain"),
    ],
)
def test_auto_takes_the_best_that_is_possible(here, name, why):
    choice = choose("auto", here)
    assert choice.name == name
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(choice.why)


@pytest.mark.parametrize("wanted", ["reference", "nccl", "nvlink"])
@pytest.mark.parametrize("here", [RACK, HOST])
def test_a_wanted_backend_is_taken_if_usable(here, wanted):
    assert choose(wanted, here).name == wanted


@pytest.mark.parametrize(
    ("wanted", "here", "message"),
    [
        ("nvlink", BOARDS, r"'nvlink' cannot be used: .*2 NVLink domains .*; allowed here are auto, reference, nccl$"),
        ("nvlink", HOSTS, r"'nvlink' .* on 2 nodes and share no memory; allowed here are auto, reference, nccl$"),
        (
            "nvlink",
            replace(HOST, buffer_bytes=2_000_000, shared_bytes=1_500_000),
            r"/dev/shm has 1500000 free; allowed here are auto, reference, nccl$",
        ),
        (
            "nccl",
            replace(HOST, libraries=("nccl",)),
            "'nccl' .*CPU ranks need a torch with gloo; allowed here are auto, nvlink$",
        ),
        (
            "nccl",
            replace(RACK, libraries=("gloo",)),
            "'nccl' .*GPU ranks need a torch with nccl; allowed here are auto, nvlink$",
        ),
        (
            "reference",
            replace(RACK, gpus_shared=True),
            "'reference' .*share a GPU, which NCCL refuses; .* auto, nvlink$",
        ),
        ("nccl", replace(BOARDS, libraries=()), "these ranks can use none$"),
        ("auto", replace(BOARDS, libraries=()), "these ranks can use none: GPU ranks need a torch with nccl"),
        ("fast", RACK, " must be one of auto, reference, nccl, nvlink, got 'fast'"),
    ],
)
def test_unusable_backends_are_refused(wanted, here, message):
    with pytest.raises(ValueError, match=f"(?s)^all2all_backend.*{message}"):
        choose(wanted, here)
