"""Which Ray cluster is asked, and what is said when it does not answer, asks for a token or cannot be started."""

from __future__ import annotations

import contextlib
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import ray

from expertwire.deploy.ray import address
from expertwire.deploy.ray.launcher import RayLauncher
from expertwire.engine.frontend.api import EngineFailed


@pytest.fixture(autouse=True)
def without_token(monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def unused():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{silent.getsockname()[1]}"


@contextlib.contextmanager
def head(token):
    """Yield the address of a server that answers strangers as Ray's head does."""

    class Handler(grpc.GenericRpcHandler):
        def service(self, details):
            def check(request, context):
                if token is not None and ("authorization", f"Bearer {token}") not in details.invocation_metadata:
                    context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
                return b""

            return grpc.unary_unary_rpc_method_handler(check)

    server = grpc.server(ThreadPoolExecutor(1), [Handler()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


class TestVariable:
    def test_is_used_where_no_address_is_given(self, monkeypatch, unused):
        monkeypatch.setenv("RAY_ADDRESS", unused)
        with pytest.raises(ValueError, match=rf"ray_address '{unused}': nothing answers there"):
            RayLauncher().hub_address()

    def test_gives_way_to_an_address(self, monkeypatch, unused):
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
        with pytest.raises(ValueError, match=rf"ray_address '{unused}': nothing answers there"):
            RayLauncher(unused).hub_address()

    @pytest.mark.parametrize(("given", "found"), [(None, "local"), ("local", "local")])
    def test_is_not_needed_to_start_ray_here(self, monkeypatch, given, found):
        asked = []
        monkeypatch.setattr(ray, "init", lambda **options: asked.append(options["address"]) or 1 / 0)
        with pytest.raises(EngineFailed, match="Ray cannot be started on this machine: division"):
            RayLauncher(given).connect()
        assert asked == [found]

    def test_is_named_if_it_is_malformed(self, monkeypatch):
        monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
        with pytest.raises(ValueError, match=r'RAY_ADDRESS: ray_address .* allowed are "host:port", "auto"'):
            RayLauncher()


class TestToken:
    def test_a_missing_token_is_named(self):
        with head("secret") as where, pytest.raises(ValueError, match="asks for a token: set RAY_AUTH_MODE=token"):
            address.check_answers(where, 10)

    def test_a_wrong_token_is_refused(self, monkeypatch):
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN", "guessed")
        with head("secret") as where, pytest.raises(ValueError, match="refuses the token"):
            address.check_answers(where, 10)

    def test_a_right_token_is_taken_from_its_file(self, monkeypatch, tmp_path):
        file = tmp_path / "token"
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
        with head("secret") as where:
            with pytest.raises(ValueError, match=f"there is no token: .*{file}"):
                address.check_answers(where, 10)
            file.write_text("secret\n")
            address.check_answers(where, 10)

    def test_a_cluster_without_one_asks_for_none(self):
        with head(None) as where:
            address.check_answers(where, 10)


def test_our_handler_of_sigterm_is_back_when_ray_has_set_its_own(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)

    def init(**options):
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        raise RuntimeError("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(EngineFailed, match="timed out during startup"):
        RayLauncher("local").connect()
    assert signal.getsignal(signal.SIGTERM) is before
