"""Identities of callers by token, by certificate, by both, by neither; the lines of the audit log."""

from __future__ import annotations

import hashlib
import json
import stat

import pytest

from expertwire.deploy.grpc.audit import AuditLog
from expertwire.deploy.grpc.identity import ANYBODY, Authenticator, Identity
from expertwire.deploy.grpc.reloading import Reloading
from expertwire.deploy.tenants import Tenants
from expertwire.engine.frontend.api import RequestFailed

PEER = "ipv4:192.0.2.1:40000"


def digest(token):
    return hashlib.sha256(token.encode()).hexdigest()


FILE = f"""
[tenants.alice]
tokens = ["{digest("a")}"]
certificates = ["alice.example.org", "spiffe://example.org/alice", "Alice"]
[tenants.bob]
tokens = ["{digest("b")}"]
certificates = ["bob.example.org"]
[tenants.ops]
tokens = ["{digest("o")}"]
admin = true
"""


class Caller:
    """A call's client as gRPC shows it."""

    def __init__(self, *headers, **names):
        self.headers, self.names = headers, names

    def invocation_metadata(self):
        return [("user-agent", "x"), *(("authorization", header) for header in self.headers)]

    def auth_context(self):
        return {kind: [name.encode()] for kind, name in self.names.items()}

    def peer(self):
        return PEER


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "tenants.toml"
    file.write_text(FILE)
    return file


def authenticator(file, audit=None):
    return Authenticator(Reloading([file], lambda: Tenants.read(str(file))), audit or AuditLog())


@pytest.mark.parametrize(
    ("caller", "tenant"),
    [
        (Caller("Bearer a"), "alice"),
        (Caller("bearer b"), "bob"),
        (Caller(peer_dns="alice.example.org"), "alice"),
        (Caller(peer_uri="spiffe://example.org/alice", x509_common_name="any"), "alice"),
        (Caller(x509_common_name="Alice"), "alice"),
        (Caller("Bearer b", peer_dns="proxy.example.org"), "bob"),  # whose certificate is no tenant's
        (Caller("Bearer a", peer_dns="alice.example.org"), "alice"),
        (Caller(), None),
        (Caller("Bearer x"), None),
        (Caller("Bearer "), None),
        (Caller("Bearer"), None),
        (Caller("a"), None),
        (Caller("Basic a"), None),
        (Caller(f"Bearer {digest('a')}"), None),
        (Caller("Bearer a", "Bearer b"), None),
        (Caller("Bearer b", peer_dns="alice.example.org"), None),
        (Caller("Bearer x", peer_dns="alice.example.org"), None),
        (Caller(peer_dns="mallory.example.org"), None),
        (Caller(peer_dns="alice.example.org", peer_uri="x", x509_common_name="bob.example.org"), None),
        (Caller(x509_subject_alternative_name="alice.example.org"), None),  # of a kind that the file does not name
    ],
)
def test_callers(file, caller, tenant):
    if tenant is None:
        messages = set()
        for each in (caller, Caller("Bearer unknown")):
            with pytest.raises(RequestFailed) as caught:
                authenticator(file).identify(each, "Generate")
            assert caught.value.error.code == "UNAUTHENTICATED"
            messages.add(caught.value.error.message)
        assert len(messages) == 1
    else:
        found = authenticator(file).identify(caller, "Generate")
        assert found == Identity(tenant=tenant, is_verified=True, is_admin=False)


def test_administrators(file):
    found = authenticator(file).identify(Caller("Bearer o"), "FlushCache")
    assert found == Identity(tenant="ops", is_verified=True, is_admin=True)
    found.check_admin("FlushCache")
    with pytest.raises(RequestFailed, match="admin") as caught:
        authenticator(file).identify(Caller("Bearer a"), "FlushCache").check_admin("FlushCache")
    assert caught.value.error.code == "PERMISSION_DENIED"


def test_without_a_file_everybody_is_believed():
    assert Authenticator(None, AuditLog()).identify(Caller("Bearer x"), "Generate") is ANYBODY
    assert ANYBODY.tenant_of("anyone") == "anyone"
    ANYBODY.check_admin("FlushCache")


def test_a_request_counts_for_the_verified_tenant(file):
    alice = authenticator(file).identify(Caller("Bearer a"), "Generate")
    assert alice.tenant_of("") == alice.tenant_of("alice") == "alice"
    with pytest.raises(RequestFailed, match="tenant") as caught:
        alice.tenant_of("bob")
    assert caught.value.error.code == "PERMISSION_DENIED"


def test_a_token_that_leaves_the_file_is_refused(file):
    tenants = Reloading([file], lambda: Tenants.read(str(file)))
    found = Authenticator(tenants, AuditLog())
    found.identify(Caller("Bearer a"), "Generate")
    file.write_text(FILE.replace(digest("a"), digest("new")))
    assert tenants.refresh()
    found.identify(Caller("Bearer new"), "Generate")
    with pytest.raises(RequestFailed):
        found.identify(Caller("Bearer a"), "Generate")


def test_the_audit_log(file, tmp_path):
    log, now = tmp_path / "audit.jsonl", [7.0]
    audit = AuditLog(str(log), lambda: now[0])
    found = authenticator(file, audit)
    for second, count in ((7.0, 50), (8.0, 1)):
        now[0] = second
        for _ in range(count):
            with pytest.raises(RequestFailed):
                found.identify(Caller("Bearer wrong-token"), "Generate")
    audit.record("FlushCache", "OK", tenant="ops", peer=PEER, freed=3)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    expected = {"tenant": "", "peer": PEER, "method": "Generate", "outcome": "UNAUTHENTICATED"}
    assert all(expected.items() <= line.items() and "time" in line for line in lines[:11])
    assert [line.get("num_suppressed", 0) for line in lines[:-1]] == [0] * 10 + [40]
    assert {"tenant": "ops", "method": "FlushCache", "outcome": "OK", "freed": 3}.items() <= lines[-1].items()
    assert "wrong-token" not in log.read_text()
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_a_rotated_audit_log_goes_on(tmp_path):
    log = tmp_path / "audit.jsonl"
    audit = AuditLog(str(log))
    audit.record("GetStats", "OK")
    log.rename(tmp_path / "audit.jsonl.1")
    audit.record("FlushCache", "OK")
    assert "FlushCache" in log.read_text() and "GetStats" not in log.read_text()


def test_an_audit_log_that_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match=r"audit_log .*/no/log cannot be written: No such file"):
        AuditLog(str(tmp_path / "no" / "log"))
