"""TLS between clients and the server: who gets in, with which status the others fail, and certificates that change."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from helpers import fake_frontend
from helpers.certificates import Authority

from expertwire.deploy.grpc.config import ServerConfig
from expertwire.deploy.grpc.credentials import ServerCertificates, ssl_credentials
from expertwire.deploy.grpc.reloading import Reloading
from expertwire.deploy.grpc.server import Server
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.deploy.proto import expertwire_v1_pb2_grpc as pb_grpc


@pytest.fixture(scope="module")
def authorities(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    return Authority(folder / "ours"), Authority(folder / "theirs")


@contextlib.asynccontextmanager
async def running(certificates):
    """A server with these certificates; yields its port."""
    server, stop = Server("127.0.0.1", 0, credentials=certificates.credentials()), asyncio.Event()
    serving = asyncio.ensure_future(server.serve(fake_frontend.FakeFrontend(), stop=stop, drain_timeout_s=1.0))
    try:
        yield server.port
    finally:
        stop.set()
        await serving


async def call(port, credentials, host="localhost"):
    """Return the status of a call over a new connection."""
    options = (("grpc.use_local_subchannel_pool", 1),)
    channel = (
        grpc.aio.insecure_channel(f"{host}:{port}", options)
        if credentials is None
        else grpc.aio.secure_channel(f"{host}:{port}", credentials, options)
    )
    async with channel:
        try:
            await pb_grpc.InferenceStub(channel).GetModelInfo(pb.GetModelInfoRequest(), timeout=20)
        except grpc.aio.AioRpcError as error:
            return error.code().name
    return "OK"


@pytest.mark.parametrize(
    ("client", "status"),
    [
        ("our authority", "OK"),
        ("no TLS", "UNAVAILABLE"),
        ("another authority", "UNAVAILABLE"),
        ("another host name", "UNAVAILABLE"),
    ],
)
def test_the_client_checks_the_server(authorities, client, status):
    ours, theirs = authorities
    server = ours.issue("server", "localhost")
    host = "127.0.0.1" if client == "another host name" else "localhost"
    credentials = {"no TLS": None, "another authority": ssl_credentials(theirs.ca_certs)}
    chosen = credentials.get(client, ssl_credentials(ours.ca_certs))

    async def scenario():
        async with running(ServerCertificates(server.keyfile, server.certfile)) as port:
            return await call(port, chosen, host)

    assert asyncio.run(scenario()) == status


def test_an_expired_certificate_of_the_server(authorities):
    ours, _ = authorities
    server = ours.issue("expired-server", "localhost", expired=True)

    async def scenario():
        async with running(ServerCertificates(server.keyfile, server.certfile)) as port:
            return await call(port, ssl_credentials(ours.ca_certs))

    assert asyncio.run(scenario()) == "UNAVAILABLE"


@pytest.mark.parametrize(
    ("client", "status"),
    [("ours", "OK"), ("none", "UNAVAILABLE"), ("another authority's", "UNAVAILABLE"), ("expired", "UNAVAILABLE")],
)
def test_the_server_checks_the_client(authorities, client, status):
    ours, theirs = authorities
    server = ours.issue("server", "localhost")
    issued = {
        "ours": lambda: ours.issue("client", "alice.example.org"),
        "none": lambda: None,
        "another authority's": lambda: theirs.issue("client", "alice.example.org"),
        "expired": lambda: ours.issue("client", "alice.example.org", expired=True),
    }[client]()
    own = {} if issued is None else {"certfile": issued.certfile, "keyfile": issued.keyfile}
    credentials = ssl_credentials(ours.ca_certs, **own)

    async def scenario():
        async with running(ServerCertificates(server.keyfile, server.certfile, ours.ca_certs)) as port:
            return await call(port, credentials)

    assert asyncio.run(scenario()) == status


def test_health_checks_need_the_certificate_too(authorities):
    ours, _ = authorities
    server = ours.issue("server", "localhost")

    async def scenario():
        async with (
            running(ServerCertificates(server.keyfile, server.certfile, ours.ca_certs)) as port,
            grpc.aio.secure_channel(f"localhost:{port}", ssl_credentials(ours.ca_certs)) as channel,
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
            return caught.value.code()

    assert asyncio.run(scenario()) == grpc.StatusCode.UNAVAILABLE


def test_replaced_certificates_hold_for_new_connections(authorities, tmp_path):
    ours, theirs = authorities
    old, new = ours.issue("server", "localhost"), theirs.issue("server", "localhost")
    keyfile, certfile = tmp_path / "key.pem", tmp_path / "cert.pem"
    shutil.copy(old.keyfile, keyfile)
    shutil.copy(old.certfile, certfile)
    certificates = ServerCertificates(str(keyfile), str(certfile))

    async def statuses(port):
        return [await call(port, ssl_credentials(each.ca_certs)) for each in (ours, theirs)]

    async def scenario():
        async with running(certificates) as port:
            before = await statuses(port)
            shutil.copy(new.keyfile, keyfile)
            assert not certificates.files.refresh()  # the new key does not fit the old certificate
            between = await statuses(port)
            shutil.copy(new.certfile, certfile)
            assert certificates.files.refresh()
            return before, between, await statuses(port)

    before, between, after = asyncio.run(scenario())
    assert before == between == ["OK", "UNAVAILABLE"]
    assert after == ["UNAVAILABLE", "OK"]


def test_unusable_files_are_named(authorities, tmp_path):
    ours, theirs = authorities
    server, other = ours.issue("server", "localhost"), theirs.issue("server", "localhost")
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    for arguments, parts in (
        (("/no/key", server.certfile), ["ssl_keyfile /no/key", "No such file"]),
        ((server.keyfile, "/no/cert"), ["ssl_certfile /no/cert", "No such file"]),
        ((other.keyfile, server.certfile), [other.keyfile, server.certfile, "MISMATCH"]),
        ((server.keyfile, str(empty)), [str(empty)]),
        ((server.keyfile, server.certfile, "/no/ca"), ["ssl_ca_certs /no/ca", "No such file"]),
        ((server.keyfile, server.certfile, str(empty)), [f"ssl_ca_certs {empty}"]),
    ):
        with pytest.raises(ValueError) as caught:
            ServerCertificates(*arguments)
        assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"ssl_keyfile": "k"}, ["ssl_keyfile", "ssl_certfile", "together"]),
        ({"ssl_ca_certs": "c"}, ["ssl_ca_certs", "ssl_certfile"]),
        ({"insecure": "yes"}, ["insecure", "True or False"]),
        ({"host": "0.0.0.0"}, ["--host 0.0.0.0", "--ssl-certfile", "--insecure"]),
        ({"host": "::"}, ["--host ::"]),
        ({"host": ""}, ["--insecure"]),
        ({"host": "server.example.org"}, ["--host server.example.org"]),
    ],
)
def test_wrong_options(options, parts):
    with pytest.raises(ValueError) as caught:
        ServerConfig(**options)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"host": "127.0.0.2"},
        {"host": "::1"},
        {"host": "localhost"},
        {"host": "0.0.0.0", "insecure": True},
        {"host": "0.0.0.0", "ssl_keyfile": "k", "ssl_certfile": "c"},
    ],
)
def test_hosts_that_may_be_listened_on(options):
    ServerConfig(**options)


def test_a_reloading_value_keeps_the_old_one_after_an_error(tmp_path, caplog):
    file = tmp_path / "number"
    file.write_text("1")
    value = Reloading([file], lambda: int(file.read_text()))
    assert not value.refresh()
    file.write_text("no number")
    with caplog.at_level(logging.ERROR):
        assert not value.refresh()
    assert "no number" in caplog.text and "stays in use" in caplog.text
    file.unlink()
    assert not value.refresh()
    assert (value.value, value.version) == (1, 0)
    file.write_text("23")
    assert value.refresh()
    assert (value.value, value.version) == (23, 1)
