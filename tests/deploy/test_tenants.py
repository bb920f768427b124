"""The tenants file: who is found by which token and certificate, and which message each mistake gets."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest

from expertwire.deploy.tenants import Tenant, Tenants, make_token
from expertwire.scheduler.quotas import TenantQuota

DIGEST, OTHER = (hashlib.sha256(token).hexdigest() for token in (b"token of alice", b"another"))
ALICE = f'[tenants.alice]\ntokens = ["{DIGEST}"]\n'


def read(tmp_path, text):
    file = tmp_path / "tenants.toml"
    file.write_text(text)
    return Tenants.read(str(file))


def test_tenants_are_found(tmp_path):
    tenants = read(
        tmp_path,
        f"""
        [tenants.alice]
        tokens = ["{OTHER}", "{DIGEST}"]
        certificates = ["spiffe://example.org/alice", "alice.example.org"]
        weight = 2
        max_requests = 100
        kv_share = 0.5
        [default]
        max_requests = 7
        max_running = 3
        [tenants."ops.1"]
        certificates = ["ops"]
        admin = true
        """,
    )
    alice, ops = tenants.by_name["alice"], tenants.by_name["ops.1"]
    assert (alice.admin, ops.admin) == (False, True)
    assert [tenants.with_token(token) for token in ("token of alice", "another", DIGEST, "", "x")] == [
        alice,
        alice,
        None,
        None,
        None,
    ]
    assert tenants.with_certificate({"alice.example.org", "unknown"}) is alice
    assert tenants.with_certificate({"ops"}) is ops
    assert tenants.with_certificate({"ops", "alice.example.org"}) is None
    assert tenants.with_certificate(()) is None
    assert tenants.quotas() == {
        "alice": TenantQuota(weight=2, max_requests=100, max_running=3, kv_share=0.5),
        "ops.1": TenantQuota(max_requests=7, max_running=3),
    }
    assert tenants.default_quota == TenantQuota(max_requests=7, max_running=3)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["[tenants.NAME]"]),
        ("tenants = 3", ["[tenants.NAME]"]),
        (ALICE + "[other]\n", ["[tenants.NAME]", "other"]),
        (ALICE + "[default]\nadmin = true", ["[default]", "admin is not a field"]),
        (ALICE + "[default]\nkv_share = 2", ["[default]", "kv_share"]),
        ("default = 1\n" + ALICE, ["[default]"]),
        ("[tenants", ["not TOML"]),
        ("[tenants]\nalice = 1", ["alice", "table"]),
        ("[tenants.alice]\n", ["alice", "tokens", "certificates"]),
        ('[tenants."a b"]\ntokens = []', ["'a b'", "letters"]),
        ("[tenants.alice]\ntoken = 'x'", ["alice", "token is not a field", "tokens, certificates, admin, weight"]),
        ("[tenants.alice]\ntokens = 'x'", ["alice", "tokens", "list of strings"]),
        ("[tenants.alice]\ntokens = ['secret']", ["alice", "64 hexadecimal"]),
        ("[tenants.alice]\ncertificates = ['']", ["alice", "certificates"]),
        (ALICE + "admin = 1", ["alice", "admin", "true or false"]),
        (ALICE + "max_requests = 0", ["alice", "max_requests", ">= 1"]),
        (ALICE + "weight = 'x'", ["alice", "weight"]),
        (ALICE + ALICE.replace("alice", "bob"), ["'alice' and 'bob'", "token"]),
        ("[tenants.a]\ncertificates=['x']\n[tenants.b]\ncertificates=['x']", ["'a' and 'b'", "certificate"]),
    ],
)
def test_mistakes_are_named(tmp_path, text, parts):
    with pytest.raises(ValueError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert all(part in message for part in ["tenants.toml", *parts]), message
    assert "secret" not in message


def test_a_missing_file():
    with pytest.raises(ValueError, match=r"tenants file /no/file cannot be read: No such file"):
        Tenants.read("/no/file")


def test_the_command_makes_a_token_that_the_file_knows(tmp_path):
    command = [sys.executable, "-m", "expertwire.deploy.cli", "token", "alice.1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    tenants = read(tmp_path, ALICE + done.stdout)
    assert tenants.with_token(done.stderr.strip()).name == "alice.1"
    assert done.stderr.strip() not in done.stdout


def test_tokens_are_random():
    (token, digest), (other, _) = make_token(), make_token()
    assert token != other and len(token) >= 43
    assert Tenants([Tenant(name="a", tokens=(digest,))]).with_token(token).name == "a"
