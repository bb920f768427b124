"""Verifiers as gRPC services, and modules of strategies: what they answer, and how each of their failures ends."""

from __future__ import annotations

import contextlib
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from helpers.certificates import Authority
from helpers.conservation import conserved_tokens

import expertwire
from expertwire.deploy.grpc.catalog import Catalog, check_limits, open_catalog
from expertwire.deploy.grpc.credentials import ServerCertificates, ssl_credentials
from expertwire.deploy.grpc.grpc_verifier import GrpcVerifier, VerifierServer
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.deploy.proto import expertwire_v1_pb2_grpc as pb_grpc
from expertwire.strategies import BestOfN, Candidate, VerifierError, VerifierPolicy
from expertwire.strategies.registry import STRATEGIES

DEMO = Path(expertwire.__file__).with_name("demo_model")


def candidate(text="abc", **fields):
    values = {"prompt": "p", "text": text, "prompt_token_ids": (1, 2), "token_ids": (3,), "complete": True}
    return Candidate(**{**values, **fields})


def lengths(candidates):
    return [float(len(candidate.text)) for candidate in candidates]


@contextlib.contextmanager
def verifier_of(function, **options):
    """The client of a service around a function."""
    with VerifierServer(function) as server, contextlib.closing(client_of(server.port, **options)) as verifier:
        yield verifier


def client_of(port, **options):
    return GrpcVerifier(f"127.0.0.1:{port}", **options)


@contextlib.contextmanager
def service(score):
    """The port of a service that answers what `score` returns, whatever that is."""

    class Servicer:
        def Score(self, request, context):
            return score(request, context)

    server = grpc.server(ThreadPoolExecutor(2))
    pb_grpc.add_VerifierServicer_to_server(Servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port, server
    finally:
        server.stop(0).wait()


def test_a_service_gets_the_candidates_and_gives_their_scores():
    seen = []

    def score(candidates):
        seen.extend(candidates)
        return lengths(candidates)

    given = [candidate("ab"), candidate("é" * 5, complete=False, token_ids=(), prompt_token_ids=range(3))]
    with verifier_of(score) as verifier:
        assert verifier(given) == [2.0, 5.0]
        assert verifier([]) == []
    assert seen == [given[0], candidate("é" * 5, complete=False, token_ids=(), prompt_token_ids=(0, 1, 2))]


def test_large_candidates_are_sent_in_several_calls():
    sizes = []

    def score(request, context):
        sizes.append(request.ByteSize())
        return pb.ScoreResponse(scores=[len(each.text) for each in request.candidates])

    given = [candidate("x" * (300_000 + index)) for index in range(20)]
    with service(score) as (port, _), contextlib.closing(client_of(port)) as verifier:
        assert verifier(given) == lengths(given)
    assert len(sizes) > 1
    assert max(sizes) < 4 << 20


FAULTS = {
    "raises": (lambda request, context: 1 / 0, "has failed: UNKNOWN: .*division by zero"),
    "refuses": (
        lambda request, context: context.abort(grpc.StatusCode.PERMISSION_DENIED, "not\nyou"),
        "PERMISSION_DENIED: not you",
    ),
    "NaN": (lambda request, context: pb.ScoreResponse(scores=[float("nan")]), "not a finite number"),
    "none": (lambda request, context: pb.ScoreResponse(), "0 scores of 1"),
    "too many": (lambda request, context: pb.ScoreResponse(scores=[1.0, 2.0]), "2 scores of 1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_a_service_does_wrong_is_a_verifier_error(fault):
    score, message = FAULTS[fault]
    expected = pytest.raises(VerifierError, match=message)
    with service(score) as (port, _), contextlib.closing(client_of(port)) as verifier, expected:
        verifier([candidate()])


def test_a_service_that_hangs_dies_or_comes_back():
    is_called, may_return = threading.Event(), threading.Event()

    def score(request, context):
        is_called.set()
        may_return.wait(30)
        return pb.ScoreResponse(scores=[1.0])

    with service(score) as (port, server), contextlib.closing(client_of(port, timeout_s=0.2)) as verifier:
        with pytest.raises(VerifierError, match="DEADLINE_EXCEEDED"):
            verifier([candidate()])
        is_called.clear()
        patient = client_of(port)
        ending = threading.Thread(target=lambda: is_called.wait(30) and server.stop(0))
        ending.start()
        with contextlib.closing(patient), pytest.raises(VerifierError, match=r"UNAVAILABLE|CANCELLED"):
            patient([candidate()])
        ending.join()
        may_return.set()
    with contextlib.closing(client_of(port, timeout_s=20)) as verifier:
        with pytest.raises(VerifierError, match="UNAVAILABLE"):
            verifier([candidate()])
        with VerifierServer(lengths, port=port):
            scores = None
            while scores is None:  # until its connection tries again
                with contextlib.suppress(VerifierError):
                    scores = verifier([candidate()])
            assert scores == [3.0]


def test_the_server_s_helper_says_what_is_wrong_with_its_function():
    def raising(candidates):
        raise ValueError("no such problem")

    for function, message in (
        (raising, "INTERNAL: ValueError: no such problem"),
        (lambda c: [1.0, 2.0], "2 scores of 1"),
    ):
        with verifier_of(function) as verifier, pytest.raises(VerifierError, match=message):
            verifier([candidate()])


def test_tls(tmp_path):
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    files = ours.issue("server", "localhost", "127.0.0.1")
    credentials = ServerCertificates(files.keyfile, files.certfile).credentials()
    with VerifierServer(lengths, credentials=credentials) as server:
        with contextlib.closing(client_of(server.port, credentials=ssl_credentials(ours.ca_certs))) as verifier:
            assert verifier([candidate()]) == [3.0]
        for wrong in (ssl_credentials(theirs.ca_certs), None):
            stranger, expected = (
                client_of(server.port, credentials=wrong, timeout_s=5),
                pytest.raises(VerifierError, match="UNAVAILABLE"),
            )
            with contextlib.closing(stranger), expected:
                stranger([candidate()])


def test_the_offline_api_takes_a_service_that_works_and_one_that_dies():
    params = expertwire.SamplingParams(max_tokens=6, ignore_eos=True, seed=3)
    with expertwire.LLM(DEMO, load_format="mock") as llm, conserved_tokens(llm.stats):
        with verifier_of(lambda candidates: [each.token_ids[0] for each in candidates]) as verifier:
            [output] = llm.generate([[5, 6]], params, strategy=BestOfN(4, verifier=verifier), use_tqdm=False)
            assert [each.score for each in output.group.branches] == [
                each.token_ids[0] for each in output.group.branches
            ]
        policy = VerifierPolicy(on_failure="zero")  # and the service is gone
        strategy = BestOfN(2, verifier=verifier, verifier_policy=policy)
        [output] = llm.generate([[5, 6]], params, strategy=strategy, use_tqdm=False)
        assert [each.score for each in output.group.branches] == [0.0, 0.0]
        assert "UNAVAILABLE" in output.group.branches[0].problems[0]


MODULE = """
from dataclasses import dataclass
from expertwire.strategies import Needs, Selection

@dataclass(frozen=True)
class Mine:
    size: int = 2
    needs = Needs()
    def decide(self, group): return []
    def select(self, group): return Selection(branches=(0,))

class Plain:
    pass

@dataclass
class Half:
    needs = Needs()
"""


def catalog_of(tmp_path, end, services=(), ca_certs=None):
    path = tmp_path / "mine.py"
    path.write_text(MODULE + end)
    return open_catalog(str(path), services, ca_certs)


def test_a_module_s_strategies_and_verifiers(tmp_path):
    end = 'STRATEGIES = {"mine": Mine}\nVERIFIERS = {"sum": lambda candidates: [sum(c.token_ids) for c in candidates]}'
    catalog = catalog_of(tmp_path, end, ["other=127.0.0.1:9"])
    assert catalog.strategy_names == sorted([*STRATEGIES, "mine"])
    assert catalog.verifier_names == ["other", "sum"]
    assert catalog.verifiers["sum"]([candidate(token_ids=(3, 4))]) == [7]
    strategy = catalog.strategy(pb.Strategy(custom=pb.CustomStrategy(name="mine", options='{"size": 5}')))
    assert (type(strategy).__name__, strategy.size) == ("Mine", 5)
    assert open_catalog(None, [], None) == Catalog(strategies={**STRATEGIES}, verifiers={})


WRONG_MODULES = [
    ("", "must have a dictionary STRATEGIES or VERIFIERS, got neither"),
    ("1 / 0", "cannot be imported: ZeroDivisionError: division by zero"),
    ("import sys; sys.exit(3)", "cannot be imported: SystemExit: 3"),
    ("def", "cannot be imported: SyntaxError"),
    ("STRATEGIES = [Mine]", "STRATEGIES of module .* must be a dictionary, got \\[<class"),
    ("STRATEGIES = {'best_of_n': Mine}", "must have other names than ours, got 'best_of_n'"),
    ("STRATEGIES = {'a b': Mine}", "must have names of letters, digits and _ . -, got 'a b'"),
    ("STRATEGIES = {'a': Plain}", "STRATEGIES\\['a'\\] of module .* must be a dataclass, got <class"),
    ("STRATEGIES = {'a': Mine()}", "must be a dataclass, got Mine"),
    ("STRATEGIES = {'a': Half}", "must have decide, select, got <class"),
    ("VERIFIERS = {'a': 1.0}", "VERIFIERS\\['a'\\] of module .* must be callable, got 1.0"),
    ("VERIFIERS = {5: print}", "VERIFIERS of module .* must have names of letters"),
]


@pytest.mark.parametrize(("end", "message"), WRONG_MODULES)
def test_wrong_modules_are_named(tmp_path, end, message):
    with pytest.raises(ValueError, match=message) as caught:
        catalog_of(tmp_path, end)
    assert str(caught.value).startswith("strategies: ")
    assert str(tmp_path / "mine.py") in str(caught.value)


def test_wrong_options_are_named(tmp_path):
    for arguments, message in (
        (("no.such.module", [], None), "strategies: module no.such.module cannot be imported: ModuleNotFoundError"),
        (("/no/such.py", [], None), "strategies: module /no/such.py cannot be imported: FileNotFoundError"),
        ((None, ["127.0.0.1:9"], None), "verifier must be NAME=HOST:PORT, got '127.0.0.1:9'"),
        ((None, ["a=host"], None), "verifier a must be HOST:PORT, got 'host'"),
        ((None, ["a=host:99999"], None), "verifier a must be HOST:PORT, got 'host:99999'"),
        ((None, ["a=b:1", "a=b:2"], None), "verifier must have names of which each is given once, got 'a' twice"),
        ((None, [], "ca.pem"), "verifier_ca_certs has no effect without verifier"),
        ((None, ["a=b:1"], "/no/ca.pem"), "ca_certs /no/ca.pem cannot be read"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            open_catalog(*arguments)


def test_limits_of_what_clients_may_ask_for():
    for options, message in (
        ({"n": 100_000}, "n must be at most 256 in a request, got 100000"),
        ({"table": [{"strategy": {"n": 257}}]}, "n must be at most 256 in a request, got 257"),
        ({"table": [{}] * 65}, "table must have at most 64 rows"),
        ({"verifier_policy": {"timeout_s": 1e9}}, "verifier_policy.timeout_s must be at most 300 in a request"),
        ({"revisions": 1000}, "revisions must be at most 256"),
    ):
        with pytest.raises(ValueError, match=message):
            check_limits(options)
    check_limits({"n": "many", "table": [3], "verifier_policy": 5})  # not ours to refuse
