"""The walk-through of docs/security.md is true."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from expertwire.deploy.grpc.client import Client, ServerError
from expertwire.deploy.grpc.credentials import ssl_credentials

PAGE = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
SHELL, PROGRAM = (re.search(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)[1] for kind in ("sh", "python"))
EXPERTWIRE = f"{sys.executable} -P -m expertwire.deploy.cli"


def test_it_has_at_most_ten_lines():
    assert len(f"{SHELL}{PROGRAM}".splitlines()) <= 10


@pytest.mark.slow
def test_tls_a_token_and_two_tenants(tmp_path):
    *commands, serve = SHELL.replace("expertwire ", f"{EXPERTWIRE} ").splitlines()
    for command in commands:
        subprocess.run(command, shell=True, cwd=tmp_path, check=True, capture_output=True)
    server = subprocess.Popen(
        [*serve.replace("50051", "0").split(), "--threads-per-rank", "1"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        address = f"localhost:{server.stdout.readline().rpartition(':')[2].strip()}"
        program = PROGRAM.replace("localhost:50051", address)
        done = subprocess.run([sys.executable, "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout.strip().endswith("answer 25"), done.stderr
        alice, bob = ((tmp_path / f"{name}.token").read_text().strip() for name in ("alice", "bob"))
        tls = ssl_credentials(tmp_path / "cert.pem")
        assert _outcome(address, tls, bob) == "OK"
        assert _outcome(address, tls, bob, tenant="alice") == "PERMISSION_DENIED"
        assert _outcome(address, tls, alice[:-1]) == _outcome(address, tls, None) == "UNAUTHENTICATED"
        assert _outcome(address, None, bob) == "UNAVAILABLE"
    finally:
        server.terminate()
        assert server.wait(60) == 0
        server.stdout.close()


def _outcome(address: str, credentials: grpc.ChannelCredentials | None, token: str | None, **options: str) -> str:
    with Client(address, credentials=credentials, token=token) as client:
        try:
            list(client.generate("SUM 1 2 ?", max_tokens=2, **options))
        except ServerError as error:
            return error.code
    return "OK"
