"""Verifiers in other processes: a client that is a verifier, and a server around one. Both speak `expertwire.v1.Verifier`.

with VerifierServer(lambda candidates: [float(len(candidate.text)) for candidate in candidates]) as server:
    verifier = GrpcVerifier(f"127.0.0.1:{server.port}")  # for a strategy; or `expertwire serve --verifier length=HOST:PORT`
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import grpc

from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.deploy.proto import expertwire_v1_pb2_grpc as pb_grpc
from expertwire.strategies.checks import require_integer, require_number
from expertwire.strategies.verifiers import Candidate, Verifier, VerifierError, checked_scores

MAX_MESSAGE = 64 << 20  # bytes that a `VerifierServer` takes
_CALL_BYTES = 2 << 20  # of a call with several candidates; by default gRPC servers refuse more than 4 MiB
_TOKEN_BYTES = 4  # of a token id in a message, about
_RECONNECT_MS = 1_000  # longest wait for another try to connect, so that a service that is back is used at once
_log = logging.getLogger(__name__)


class GrpcVerifier:
    """A verifier that is a gRPC service. It connects when it is first called, and again when the service is back.

    Args:
        address: "HOST:PORT".
        credentials: those of `credentials.ssl_credentials` for a service with TLS; None speaks plain text.
        timeout_s: seconds of a call, after which the connection is not waited for; a strategy's own policy may end it sooner.

    Raises:
        ValueError: names the field and the values it allows.
    """

    def __init__(
        self, address: str, *, credentials: grpc.ChannelCredentials | None = None, timeout_s: float = 30.0
    ) -> None:
        check_address("address", address)
        require_number("timeout_s", timeout_s, above=0)
        self._address, self._credentials, self._timeout_s = address, credentials, timeout_s
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None

    def __call__(self, candidates: Sequence[Candidate], /) -> list[float]:
        """Return the service's scores.

        Raises:
            VerifierError: the call has failed or was late, or there is not a score for each candidate.
        """
        stub = pb_grpc.VerifierStub(self._connected())
        scores: list[float] = []
        for request in _requests(candidates):
            try:
                response = stub.Score(request, timeout=self._timeout_s)
            except grpc.RpcError as error:
                code, details = error.code().name, " ".join((error.details() or "").split())
                raise VerifierError(f"the verifier at {self._address} has failed: {code}: {details:.300}") from error
            scores += checked_scores(list(response.scores), len(request.candidates))
        return scores

    def __repr__(self) -> str:
        return f"GrpcVerifier({self._address!r})"

    def close(self) -> None:
        """Close the connection; calls that wait fail. Idempotent."""
        with self._lock:
            if self._channel is not None:
                self._channel.close()
                self._channel = None

    def _connected(self) -> grpc.Channel:
        with self._lock:
            if self._channel is None:
                options = [("grpc.enable_retries", 0), ("grpc.max_reconnect_backoff_ms", _RECONNECT_MS)]
                self._channel = (
                    grpc.insecure_channel(self._address, options)
                    if self._credentials is None
                    else grpc.secure_channel(self._address, self._credentials, options)
                )
            return self._channel


class VerifierServer:
    """A gRPC service around a verifier. It runs in threads of this process from construction until `close`.

    Args:
        verifier: called by `num_threads` threads.
        host, port: address to listen on; port 0 takes a free one.
        credentials: for TLS; None speaks plain text.
        num_threads: calls that are served at a time.

    Attributes:
        port: the port that it listens on.

    Raises:
        ValueError: the address cannot be used.
    """

    def __init__(
        self,
        verifier: Verifier,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        credentials: grpc.ServerCredentials | None = None,
        num_threads: int = 4,
    ) -> None:
        require_integer("num_threads", num_threads, minimum=1)
        threads = ThreadPoolExecutor(num_threads, thread_name_prefix="verifier")
        options = (("grpc.max_receive_message_length", MAX_MESSAGE), ("grpc.so_reuseport", 0))
        self._server = grpc.server(threads, options=options)
        pb_grpc.add_VerifierServicer_to_server(_Servicer(verifier), self._server)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if credentials is None:
                self.port = self._server.add_insecure_port(address)
            else:
                self.port = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise ValueError(f"cannot listen on {address}: it is taken, or not of this machine") from error
        self._server.start()

    def wait(self) -> None:
        """Wait until the server is closed."""
        self._server.wait_for_termination()

    def close(self) -> None:
        """End the service; calls that run are aborted. Idempotent."""
        self._server.stop(0).wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class _Servicer:
    """The service's method."""

    def __init__(self, verifier: Verifier) -> None:
        self._verifier = verifier

    def Score(self, request: pb.ScoreRequest, context: grpc.ServicerContext) -> pb.ScoreResponse:
        """See the .proto."""
        try:
            candidates = [_from_message(candidate) for candidate in request.candidates]
            return pb.ScoreResponse(scores=checked_scores(self._verifier(candidates), len(candidates)))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the verifier's
            _log.warning("warning: a verifier has failed", exc_info=True)
            text = str(error) if isinstance(error, VerifierError) else f"{type(error).__name__}: {error}"
        context.abort(grpc.StatusCode.INTERNAL, text[:1000])
        raise AssertionError("abort raises")


def check_address(field: str, address: str) -> None:
    """Raise a ValueError unless an address is "HOST:PORT"."""
    host, colon, port = address.rpartition(":")
    if not host or not colon or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{field} must be HOST:PORT, got {address!r:.200}")


def _requests(candidates: Sequence[Candidate]) -> Iterator[pb.ScoreRequest]:
    """Yield the candidates in messages that any server takes; one that is larger alone has its own."""
    request, size = pb.ScoreRequest(), 0
    for candidate in candidates:
        num_tokens = len(candidate.prompt_token_ids) + len(candidate.token_ids)
        num_bytes = 4 * (len(candidate.prompt) + len(candidate.text)) + _TOKEN_BYTES * num_tokens
        if request.candidates and size + num_bytes > _CALL_BYTES:
            yield request
            request, size = pb.ScoreRequest(), 0
        request.candidates.append(_to_message(candidate))
        size += num_bytes
    if request.candidates:
        yield request


def _to_message(candidate: Candidate) -> pb.Candidate:
    values: dict[str, Any] = {name: getattr(candidate, name) for name in pb.Candidate.DESCRIPTOR.fields_by_name}
    return pb.Candidate(**values)


def _from_message(message: pb.Candidate) -> Candidate:
    return Candidate(
        prompt=message.prompt,
        text=message.text,
        prompt_token_ids=tuple(message.prompt_token_ids),
        token_ids=tuple(message.token_ids),
        complete=message.complete,
    )
