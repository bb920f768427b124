"""The generated gRPC code against the .proto, and the .proto against our own types."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.engine.config import ModelInfo
from expertwire.engine.request_options import RequestOptions
from expertwire.scheduler.sampling_params import SamplingParams

PROTO = Path(pb.__file__).with_name("expertwire_v1.proto")


def test_the_generated_code_is_that_of_the_proto(tmp_path):
    from grpc_tools import protoc

    virtual = "expertwire/deploy/proto"
    arguments = [f"-I{virtual}={PROTO.parent}", f"-I{Path(protoc.__file__).with_name('_proto')}"]
    out = tmp_path / "set.bin"
    assert protoc.main(["protoc", *arguments, f"--descriptor_set_out={out}", f"{virtual}/{PROTO.name}"]) == 0
    (compiled,) = FileDescriptorSet.FromString(out.read_bytes()).file
    generated = FileDescriptorProto.FromString(pb.DESCRIPTOR.serialized_pb)
    assert _lines(generated) == _lines(compiled), "run `make proto`"


def test_every_field_that_a_client_may_set_is_in_the_proto():
    fields = pb.SamplingParams.DESCRIPTOR.fields_by_name
    assert set(fields) == {field.name for field in dataclasses.fields(SamplingParams)}
    # Zero is a value: every scalar is `optional`.
    assert {name for name, field in fields.items() if not field.has_presence} == {
        "stop",
        "stop_token_ids",
        "logit_bias",
    }
    # The deadline is the call's.
    options = {field.name for field in dataclasses.fields(RequestOptions)} - {"deadline_s"}
    request = pb.GenerateRequest.DESCRIPTOR.fields_by_name
    assert set(request) == {"request_id", "text", "token_ids", "sampling_params"} | options
    assert all(request[name].has_presence for name in options)


def test_model_info_has_everything_but_the_folder():
    fields = {field.name for field in dataclasses.fields(ModelInfo)}
    assert set(pb.ModelInfo.DESCRIPTOR.fields_by_name) == fields - {"path"} | {"version"}


def _lines(file: FileDescriptorProto) -> list[str]:
    """The description as text; the compiler alone writes JSON names."""
    return [line for line in str(file).splitlines() if "json_name" not in line]
