"""Messages of too many fields are refused before they are decoded."""

from __future__ import annotations

import contextlib

import pytest
from helpers.examples import examples
from hypothesis import given
from hypothesis import strategies as st

from expertwire.deploy.grpc import wire
from expertwire.deploy.proto import expertwire_v1_pb2 as pb

REQUEST = pb.GenerateRequest.DESCRIPTOR
FULL = pb.SamplingParams(stop=["a" * 64] * 1024, stop_token_ids=range(1024), logit_bias=dict.fromkeys(range(4096), 1.0))


@pytest.mark.parametrize("prompt", [{"text": "a" * 4_000_000}, {"token_ids": pb.TokenIds(ids=range(1_000_000))}])
def test_what_a_request_may_have_is_taken(prompt):
    data = pb.GenerateRequest(sampling_params=FULL, **prompt).SerializeToString()
    wire.check_num_fields(data, REQUEST)
    session = pb.SessionRequest.DESCRIPTOR
    wire.check_num_fields(b"".join([b"\x0a", varint(len(data)), data]), session)


def varint(number):
    return bytes([number & 127 | 128, number >> 7 & 127 | 128, number >> 14 & 127 | 128, number >> 21])


@pytest.mark.parametrize(
    "data",
    [
        pb.GenerateRequest(sampling_params=pb.SamplingParams(stop=["a"] * 100_000)).SerializeToString(),
        pb.GenerateRequest(sampling_params=pb.SamplingParams(stop=["a"] * 9_000)).SerializeToString() * 9,
        b"\x22\x00" * 100_000,  # empty sampling_params
        b"\x08\x01" * 100_000,  # numbers
        b"\x0b" * 200_000,  # groups
    ],
    ids=["strings", "repeated", "empty", "numbers", "groups"],
)
def test_too_many_fields_are_refused(data):
    with pytest.raises(ValueError, match="at most 8192 fields"):
        wire.check_num_fields(data, REQUEST)


@examples(50)
@given(st.binary(min_size=1, max_size=60))
def test_malformed_messages_raise_nothing_else(data):
    with contextlib.suppress(ValueError):
        wire.check_num_fields(data * (200_000 // len(data)), REQUEST)
