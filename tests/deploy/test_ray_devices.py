"""A real Ray that was told of GPUs: its workers see all of the node's and know their own, in the NVLink domain that has room."""

import logging

import pytest
import ray
from helpers.control_ranks import TOKEN

from expertwire.comm.control.channel import ControlHub
from expertwire.deploy.ray.launcher import RayLauncher
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.launcher import WorkerSpec

CONFIG = EngineConfig(model="none", device="cuda", ep_size=3)


@pytest.fixture(scope="module")
def cluster():
    ray.init(
        num_cpus=3,
        num_gpus=3,
        labels={"ray.io/gpu-domain": "rack-1"},
        include_dashboard=False,
        logging_level=logging.ERROR,
        object_store_memory=80 << 20,
    )
    yield
    ray.shutdown()


@pytest.mark.slow
def test_every_rank_sees_all_gpus_of_its_node_and_has_one_of_its_own(cluster):
    launcher = RayLauncher(worker="helpers.control_ranks:worker_main")
    hub = ControlHub(3, address=launcher.hub_address(), token=TOKEN)
    try:
        launcher.start(WorkerSpec(config=CONFIG, num_ranks=3, address=hub.address, token=TOKEN))
        hellos = hub.wait_joined(60, launcher.poll)
    finally:
        hub.close()
        launcher.stop(10)
    assert {bytes(hello["visible"]) for hello in hellos} == {b"all"}
    assert sorted(int(hello["gpu"][0]) for hello in hellos) == [0, 1, 2]


@pytest.mark.slow
def test_more_ranks_than_gpus_are_refused(cluster):
    launcher = RayLauncher(worker="helpers.control_ranks:worker_main")
    launcher.connect()
    with pytest.raises(ValueError, match="ep_size is 4, but the Ray cluster has 3 GPUs"):
        launcher.start(WorkerSpec(config=CONFIG, num_ranks=4, address="tcp:127.0.0.1:1", token=TOKEN))
    launcher.stop(10)
