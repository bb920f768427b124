"""Strangers on a server with tenants: each call of one client that concerns another, and the status that it gets."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json

import grpc
import pytest
from google.protobuf import json_format
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from helpers import fake_frontend
from helpers.certificates import Authority

from expertwire.deploy.grpc.calls import SERVICE
from expertwire.deploy.grpc.config import ServerConfig
from expertwire.deploy.grpc.credentials import ssl_credentials
from expertwire.deploy.grpc.security import Security
from expertwire.deploy.grpc.server import Server
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.deploy.proto import expertwire_v1_pb2_grpc as pb_grpc


def hashed(token):
    """Return the digest of a token as the file has it."""
    return hashlib.sha256(token.encode()).hexdigest()


TOKENS = {"alice": "a", "bob": "b", "ops": "o"}
FILE = "\n".join(
    f'[tenants.{name}]\ntokens = ["{hashed(token)}"]\nadmin = {str(name == "ops").lower()}\n'
    f'certificates = ["{name}.example.org"]'
    for name, token in TOKENS.items()
)


class Running:
    """A server with tenants, and its clients."""

    def __init__(self, server, frontend, security, folder):
        self.port, self.frontend, self.security = server.port, frontend, security
        self.tenants, self.audit_log = folder / "tenants.toml", folder / "audit.jsonl"
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.port}")
        self.stub = pb_grpc.InferenceStub(self.channel)

    async def status(self, awaitable):
        """Return the name of the status that a call ends with."""
        try:
            await awaitable
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return "OK"

    async def generating(self, name, request_id="mine", **fields):
        """Return a running call of a tenant."""
        count = len(self.frontend.submitted)
        call = self.stub.Generate(
            pb.GenerateRequest(text="x", request_id=request_id, **fields), metadata=authorization(TOKENS[name])
        )
        while len(self.frontend.submitted) == count and not call.done():
            await asyncio.sleep(0.005)
        return call

    def audited(self):
        """Return the lines of the audit log without their times and addresses."""
        lines = [json.loads(line) for line in self.audit_log.read_text().splitlines()]
        return [{key: value for key, value in line.items() if key not in ("time", "peer")} for line in lines]


def authorization(token):
    return (("authorization", f"Bearer {token}"),)


@contextlib.asynccontextmanager
async def running(folder, **options):
    tenants = folder / "tenants.toml"
    tenants.write_text(FILE)
    config = ServerConfig(tenants=str(tenants), audit_log=str(folder / "audit.jsonl"), **options)
    security, frontend, stop = Security.open(config), fake_frontend.FakeFrontend(), asyncio.Event()
    server = Server("127.0.0.1", 0, credentials=security.credentials())
    serving = asyncio.ensure_future(
        server.serve(frontend, authenticator=security.authenticator(), stop=stop, drain_timeout_s=0.1)
    )
    run = Running(server, frontend, security, folder)
    try:
        yield run
    finally:
        await run.channel.close()
        stop.set()
        await serving


def scenario(function):
    """Make an async test with a `Running` argument into a pytest function."""

    def test(tmp_path):
        async def run():
            async with running(tmp_path) as server:
                await function(server)

        asyncio.run(asyncio.wait_for(run(), 60))

    test.__name__, test.__doc__ = function.__name__, function.__doc__
    return test


async def collect(call):
    return [message async for message in call]


@pytest.mark.parametrize("method", [method.name for method in SERVICE.methods])
@pytest.mark.parametrize(
    "metadata",
    [(), authorization("wrong"), (("authorization", "Basic YTpi"),), authorization("a") + authorization("b")],
    ids=["no token", "wrong token", "another scheme", "two tokens"],
)
def test_nobody_calls_without_a_token(tmp_path, method, metadata):
    """A stranger is refused before its message: none is sent here."""

    async def run():
        async with running(tmp_path) as server:
            call = server.channel.stream_stream(f"/{SERVICE.full_name}/{method}")(metadata=metadata)
            assert await server.status(call.read()) == "UNAUTHENTICATED"
            assert server.audited() == [{"tenant": "", "method": method, "outcome": "UNAUTHENTICATED"}]

    asyncio.run(asyncio.wait_for(run(), 60))


@pytest.mark.parametrize("method", ["FlushCache", "GetServerInfo"])
@pytest.mark.parametrize(("name", "status"), [("alice", "PERMISSION_DENIED"), ("ops", "OK")])
def test_methods_for_administrators(tmp_path, method, name, status):
    async def run():
        async with running(tmp_path) as server:
            request = getattr(pb, f"{method}Request")()
            call = getattr(server.stub, method)(request, metadata=authorization(TOKENS[name]))
            assert await server.status(call) == status
            assert server.audited() == [{"tenant": name, "method": method, "outcome": status}]

    asyncio.run(asyncio.wait_for(run(), 60))


@scenario
async def test_health_needs_no_token_and_reflection_does(server):
    health = health_pb2_grpc.HealthStub(server.channel)
    assert await server.status(health.Check(health_pb2.HealthCheckRequest())) == "OK"
    reflection = reflection_pb2_grpc.ServerReflectionStub(server.channel)
    for metadata, status in (((), "UNAUTHENTICATED"), (authorization("a"), "OK")):
        requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        assert await server.status(collect(reflection.ServerReflectionInfo(requests, metadata=metadata))) == status


@scenario
async def test_a_request_counts_for_its_tenant(server):
    await server.generating("alice")
    await server.generating("alice", "other", tenant="alice")
    assert [options.tenant for options in server.frontend.options] == ["alice", "alice"]
    refused = await server.generating("alice", "third", tenant="bob")
    assert await refused.code() == grpc.StatusCode.PERMISSION_DENIED
    assert len(server.frontend.submitted) == 2


@scenario
async def test_ids_are_the_tenants_own(server):
    await server.generating("alice")
    await server.generating("bob")
    assert len(server.frontend.submitted) == 2  # the same id, and nobody learns of the other
    again = await server.generating("alice")
    assert await again.code() == grpc.StatusCode.ALREADY_EXISTS


@scenario
async def test_nobody_ends_the_requests_of_another(server):
    await server.generating("alice")
    same = pb.AbortRequest(request_id="mine")
    assert await server.status(server.stub.Abort(same, metadata=authorization("b"))) == "OK"  # as for an id of nobody
    unknown = pb.AbortRequest(request_id="mine", tenant="alice")
    assert await server.status(server.stub.Abort(unknown, metadata=authorization("b"))) == "PERMISSION_DENIED"
    assert server.frontend.aborted == []
    assert await server.status(server.stub.Abort(same, metadata=authorization("a"))) == "OK"
    assert server.frontend.aborted == [0]
    assert server.audited() == []


@scenario
async def test_an_administrator_ends_the_requests_of_another(server):
    await server.generating("alice")
    request = pb.AbortRequest(request_id="mine", tenant="alice")
    assert await server.status(server.stub.Abort(request, metadata=authorization("o"))) == "OK"
    assert server.frontend.aborted == [0]
    assert server.audited() == [{"tenant": "ops", "method": "Abort", "outcome": "OK", "of": "alice"}]


@scenario
async def test_statistics_are_audited(server):
    assert await server.status(server.stub.GetStats(pb.GetStatsRequest(), metadata=authorization("o"))) == "OK"
    assert server.audited() == [{"tenant": "ops", "method": "GetStats", "outcome": "OK"}]


def test_a_session_ends_with_the_token(tmp_path):
    """Running requests go on; those that come after the token has left the file are refused."""

    async def run():
        async with running(tmp_path) as server:
            call = server.stub.Session(metadata=authorization(TOKENS["bob"]))
            statuses = []
            for key in (1, 2):
                request = pb.SubmitRequest(key=key, request=pb.GenerateRequest(text="x"))
                await call.write(pb.SessionRequest(requests=[request]))
                if key == 1:
                    while not server.frontend.submitted:
                        await asyncio.sleep(0.005)
                    server.tenants.write_text(FILE.replace(hashed("b"), hashed("new")))
                    assert server.security.tenants.refresh()
            statuses += [(end.key, end.code) for end in (await call.read()).ends]
            call.cancel()
            assert len(server.frontend.submitted) == 1
            return statuses

    assert asyncio.run(asyncio.wait_for(run(), 60)) == [(2, grpc.StatusCode.UNAUTHENTICATED.value[0])]


@pytest.mark.parametrize(("name", "seen"), [("alice", {"alice"}), ("bob", set()), ("ops", {"alice", "carol"})])
def test_statistics_show_only_ones_own(tmp_path, name, seen):
    async def run():
        async with running(tmp_path) as server:
            tenants = {"alice": {"running": 1}, "carol": {"running": 2}}
            server.frontend.stats_values = {"num_running": 3, "tenants": tenants, "expert_load": [[]]}
            stats = await server.stub.GetStats(pb.GetStatsRequest(), metadata=authorization(TOKENS[name]))
            return json_format.MessageToDict(stats.values)

    stats = asyncio.run(asyncio.wait_for(run(), 60))
    assert (stats["num_running"], set(stats["tenants"])) == (3, seen)


@pytest.mark.parametrize(
    ("issued_for", "token", "status"),
    [
        ("alice.example.org", None, "OK"),
        ("alice.example.org", "a", "OK"),
        ("alice.example.org", "b", "UNAUTHENTICATED"),
        ("proxy.example.org", "b", "OK"),
        ("proxy.example.org", None, "UNAUTHENTICATED"),
        (None, "a", "UNAVAILABLE"),
    ],
)
def test_certificates(tmp_path, issued_for, token, status):
    """Each certificate and token, and the status of a call with them."""
    authority = Authority(tmp_path / "authority")
    issued = authority.issue("server", "localhost")
    options = {
        "ssl_keyfile": issued.keyfile,
        "ssl_certfile": issued.certfile,
        "ssl_ca_certs": authority.ca_certs,
    }
    client = None if issued_for is None else authority.issue("client", issued_for)
    own = {} if client is None else {"certfile": client.certfile, "keyfile": client.keyfile}
    metadata = () if token is None else authorization(token)

    async def run():
        async with (
            running(tmp_path, **options) as server,
            grpc.aio.secure_channel(f"localhost:{server.port}", ssl_credentials(authority.ca_certs, **own)) as channel,
        ):
            return await server.status(
                pb_grpc.InferenceStub(channel).GetModelInfo(pb.GetModelInfoRequest(), metadata=metadata)
            )

    assert asyncio.run(asyncio.wait_for(run(), 60)) == status


def test_a_changed_file_is_read_again(tmp_path):
    tenants = tmp_path / "tenants.toml"
    tenants.write_text(FILE)
    security = Security.open(ServerConfig(tenants=str(tenants), audit_log=str(tmp_path / "audit.jsonl")))

    async def run():
        refreshing = asyncio.create_task(security.keep_fresh())
        tenants.write_text(FILE.replace("tenants.bob", "tenants.carol"))
        while not (tmp_path / "audit.jsonl").read_text():
            await asyncio.sleep(0.05)
        refreshing.cancel()

    asyncio.run(asyncio.wait_for(run(), 60))
    assert set(security.tenants.value.by_name) == {"alice", "carol", "ops"}
    assert json.loads((tmp_path / "audit.jsonl").read_text())["method"] == "TenantsReload"
