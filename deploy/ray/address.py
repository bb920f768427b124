"""The address of a Ray cluster, and whether it answers us, before `ray.init` tries for 20 s and then does not say why not."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import grpc

VARIABLE = "RAY_ADDRESS"
_CHECK = (
    "/ray.rpc.NodeInfoGcsService/CheckAlive"  # of Ray's head (src/ray/protobuf/gcs_service.proto, ray 2.50 to 2.60)
)


def check_address(address: str | None) -> None:
    """Check the form of an address.

    Raises:
        ValueError: it is malformed.
    """
    if address not in (None, "auto", "local") and host_and_port(address or "") is None:
        raise ValueError(f'ray_address {address!r}: allowed are "host:port", "auto", "local" and None')


def from_environment() -> str | None:
    """Return the address in Ray's own variable, None if it is not set.

    Raises:
        ValueError: it is malformed.
    """
    address = os.environ.get(VARIABLE) or None
    try:
        check_address(address)
    except ValueError as error:
        raise ValueError(f"the environment variable {VARIABLE}: {error}") from error
    return address


def host_and_port(address: str) -> tuple[str, int] | None:
    """Return the parts of "host:port", or None."""
    host, _, port = address.rpartition(":")
    return (host, int(port)) if host and port.isdecimal() and "/" not in host else None


def check_answers(address: str, timeout_s: float) -> None:
    """Check that something listens there, and that it takes our token if it is a Ray cluster that asks for one.

    Args:
        address: "host:port".
        timeout_s: seconds.

    Raises:
        ValueError: nothing answers, or the token is missing or wrong.
    """
    where = host_and_port(address)
    assert where is not None, address
    try:
        socket.create_connection(where, timeout=timeout_s).close()
    except OSError as error:
        raise ValueError(f"ray_address {address!r}: nothing answers there ({error})") from error
    token = _token()
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    with grpc.insecure_channel(address) as channel:
        check: Any = channel.unary_unary(_CHECK)
        try:
            check(b"", timeout=timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise ValueError(f"ray_address {address!r}: {_why_refused(token)}") from error
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                message = f"no Ray cluster answered within {timeout_s:g} s"
                raise ValueError(f"ray_address {address!r}: {message}") from error


def _why_refused(token: str | None) -> str:
    if token is not None:
        return "the Ray cluster refuses the token that RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token gives"
    return "the Ray cluster asks for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file that has it"


def _token() -> str | None:
    """Return the token that Ray sends, found where Ray looks for it; None if it sends none."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return file.read_text().strip()
    except OSError as error:
        raise ValueError(f"RAY_AUTH_MODE is 'token', and there is no token: {error}") from error
