"""`deploy/ray_cluster.sh` makes a cluster out of two hosts, on which the ranks of one engine join, relay, and are watched."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.control_ranks import TOKEN, plan
from helpers.two_hosts import two_hosts, why_not

from expertwire import LLM, SamplingParams
from expertwire.comm.control.channel import ControlHub
from expertwire.deploy.ray.launcher import RayLauncher
from expertwire.engine.launcher import RankFailed, WorkerSpec

SCRIPT = str(Path(__file__).resolve().parents[2] / "deploy" / "ray_cluster.sh")
NUM_RANKS = 4
DEMO_MODEL = str(Path(__file__).resolve().parents[2] / "expertwire" / "demo_model")


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_ranks_on_two_hosts_join_step_and_are_watched(tmp_path):
    token, other_token = tmp_path / "token", tmp_path / "other"
    with two_hosts() as (head, worker):
        code, said = head.run(SCRIPT, "head", "--token-file", str(token), "--num-cpus", "2")
        assert code == 0, said
        assert token.stat().st_mode & 0o777 == 0o600
        address = f"{head.ip}:6379"
        join = ("join", address, "--num-cpus", "2", "--token-file")
        assert f"ray_cluster.sh join {address} --token-file {token}" in said

        other_token.write_text("guessed")
        stranger = worker.popen(SCRIPT, *join, str(other_token), stderr=subprocess.PIPE, text=True)
        code, said = worker.run(SCRIPT, *join, str(token))
        assert code == 0, said
        assert f"{worker.ip} has joined {address}" in said
        assert f"the token in {other_token} is not the head's" in stranger.communicate(timeout=120)[1]
        assert stranger.returncode == 1

        environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        code, said = head.run(
            sys.executable, "-c", f"import test_ray_cluster as t; t.drive({address!r})", env=environment
        )
        assert code == 0, said
        report = json.loads(said.splitlines()[-1])
        assert report["sums"] == [[10 * step] * NUM_RANKS for step in range(20)]
        assert len(set(report["nodes"][:2])) == len(set(report["nodes"][2:])) == 1, "the ranks of a host are neighbours"
        assert len(set(report["nodes"])) == 2
        assert report["receivers"] == [0, 1, 2], "one relay on the host without the controller"
        assert report["failure"][0] == 3
        assert f"on {worker.ip} has died" in report["failure"][1]

        across = "import test_ray_cluster as t; t.generate"
        code, said = head.run(sys.executable, "-c", f"{across}({address!r})", env=environment, timeout=240)
        assert code == 0, said
        assert json.loads(said.splitlines()[-1]) == generate()

        code, said = worker.run(SCRIPT, "stop")
        assert code == 0, said
        code, said = worker.run("sh", "-c", "cat /proc/[0-9]*/comm")
        assert "raylet" not in said


def generate(address=None):
    """Greedy tokens of the demo model from four ranks of the cluster, or, without one, from one process here; prints them."""
    place = {"launcher": "ray", "ray_address": address, "ep_size": NUM_RANKS} if address else {}
    with LLM(DEMO_MODEL, dtype="float32", threads_per_rank=1, **place) as llm:
        prompts = [f"SUM {n} {n + 7} {2 * n} ?" for n in range(3, 11)]
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
    tokens = [output.outputs[0].token_ids for output in outputs]
    print(json.dumps(tokens))
    return [list(ids) for ids in tokens]


def drive(address):
    """On the head: what an engine's parent does, with workers that have no model. Prints what it saw as JSON."""
    launcher = RayLauncher(address, worker="helpers.control_ranks:worker_main")
    hub = ControlHub(NUM_RANKS, address=launcher.hub_address(), token=TOKEN)
    try:
        launcher.start(WorkerSpec(config={}, num_ranks=NUM_RANKS, address=hub.address, token=TOKEN))
        hellos = hub.wait_joined(60, launcher.poll)
        sums = []
        for step in range(20):
            hub.publish(plan(step))
            sums.append([int(result["sum"][0]) for result in hub.collect(30)])
        hub.publish(plan(20, die=3))
        failure = None
        while failure is None:
            failure = first_failure(launcher)
    finally:
        hub.close()
        launcher.stop(10)
    nodes = [bytes(hello["node"]).decode() for hello in hellos]
    print(json.dumps({"sums": sums, "nodes": nodes, "receivers": sorted(hub._receivers), "failure": failure}))


def first_failure(launcher):
    time.sleep(0.05)
    try:
        launcher.poll()
    except RankFailed as error:
        return error.rank, error.message
    return None


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "usage:"),
        (["start"], "unknown command start"),
        (["head"], "--token-file is missing"),
        (["head", "--token-file"], "--token-file needs a value"),
        (["head", "--token-file", "x", "--port", "many"], "--port: 'many' is not a number"),
        (["head", "--token-file", "x", "--speed", "9"], "unknown option --speed"),
        (["join", "--token-file", "x"], "join needs the head's HOST:PORT, got '--token-file'"),
    ],
)
def test_wrong_arguments_get_a_clear_answer(arguments, complaint):
    done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert complaint in done.stderr


FABRIC = """
    Product Name                          : NVIDIA GB200
    Fabric
        State                             : {state}
        Status                            : Success
        CliqueId                          : {clique}
        ClusterUUID                       : {cluster}
        Health
            Bandwidth                     : Full
    Processes                             : None
"""
RACK = "5f0c1c8e-0000-4d4f-9a0e-1e2d3c4b5a69"


@pytest.mark.parametrize(
    ("gpus", "label"),
    [
        ([("Completed", 3, RACK)] * 4, f"--labels ray.io/gpu-domain={RACK}.3"),
        ([("Completed", 3, RACK), ("In Progress", 3, RACK)], ""),
        ([("Completed", 3, RACK), ("Completed", 4, RACK)], ""),
        ([("Completed", 0, "00000000-0000-0000-0000-000000000000")] * 8, ""),
        ([("N/A", "N/A", "N/A")], ""),
        ([], ""),
    ],
    ids=["a rack", "not yet", "two cliques", "one machine", "no fabric", "no GPU"],
)
def test_a_machine_is_labelled_with_its_nvlink_domain(tmp_path, gpus, label):
    """Ray and nvidia-smi are scripts; the one says what it was asked for, the other what a driver says."""
    (tmp_path / "said").write_text(
        "".join(FABRIC.format(state=state, clique=clique, cluster=cluster) for state, clique, cluster in gpus)
    )
    for name, line in (("ray", f'echo "$@" > {tmp_path}/asked'), ("nvidia-smi", f"cat {tmp_path}/said")):
        script = tmp_path / name
        script.write_text(f"#!/bin/sh\n{line}\n")
        script.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [SCRIPT, "head", "--token-file", str(tmp_path / "token"), "--node-ip", "192.0.2.9", "--num-gpus", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "asked").read_text()
    assert ("--labels" in asked) == bool(label)
    assert label in asked


def test_joining_without_a_token_or_a_head_gets_a_clear_answer(tmp_path):
    token = tmp_path / "token"
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def join():
        command = [SCRIPT, "join", "127.0.0.1:1", "--token-file", str(token)]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment).stderr

    assert f"{token} does not exist or is empty; copy it from the head" in join()
    token.write_text("a token")
    assert "nothing answers at 127.0.0.1:1" in join()
