"""The generated gRPC code against the .proto, and the .proto against our own types."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from expertwire.deploy.grpc import messages as grpc_messages
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.engine.config.engine_config import ModelInfo
from expertwire.engine.frontend.api import RequestOptions
from expertwire.engine.frontend.chat import Chat
from expertwire.engine.frontend.output_formats import OUTPUT_FORMATS, PLAIN
from expertwire.scheduler.sampling_params import SamplingParams

PROTO = Path(pb.__file__).with_name("expertwire_v1.proto")


def test_the_generated_code_is_that_of_the_proto(tmp_path):
    protoc = pytest.importorskip("grpc_tools.protoc")
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
    assert set(request) == {"request_id", "text", "token_ids", "chat", "sampling_params", "strategy", "model"} | options
    assert all(request[name].has_presence for name in options)
    # A client's own template would be its code.
    chat = pb.Chat.DESCRIPTOR.fields_by_name
    assert set(chat) == {field.name for field in dataclasses.fields(Chat)} - {"chat_template"}
    assert all(field.has_presence for name, field in chat.items() if name != "messages")


def test_model_info_has_everything_but_the_folder_and_how_tokens_travel():
    fields = {field.name for field in dataclasses.fields(ModelInfo)} - {"path", "all_to_all"}
    server = {"version", "output_format", "chat_variables", "strategies", "verifiers"}
    assert set(pb.ModelInfo.DESCRIPTOR.fields_by_name) == fields | server


def test_output_formats_are_whole_but_for_their_marks():
    for output_format in (*OUTPUT_FORMATS, PLAIN):
        message = grpc_messages.from_output_format(output_format)
        assert (message.name, tuple(message.end_of_turn)) == (output_format.name, output_format.end_of_turn)
        assert (message.reasoning_start, message.reasoning_end) == (output_format.reasoning or ("", ""))
        assert tuple(message.reasoning_efforts) == output_format.reasoning_efforts


def test_chats_arrive_as_they_were_sent():
    messages = [{"role": "user", "content": "é <b>"}]
    tools = [{"zoo": 1, "ant": [1.0, None, True, {"b": "ü", "a": 2}]}]
    for chat in (
        Chat(messages=messages),
        Chat(messages=messages, tools=tools, reasoning_effort="low", chat_template_kwargs={"x": {"z": 1, "y": 2}}),
        Chat(messages=messages, thinking=False, add_generation_prompt=False, continue_final_message=True),
    ):
        request = pb.GenerateRequest(chat=grpc_messages.from_chat(chat))
        arrived = grpc_messages.to_prompt(pb.GenerateRequest.FromString(request.SerializeToString())).parse()
        assert arrived == chat
        assert str(arrived) == str(chat)  # with the keys in the same order, and 1.0 no integer


def _lines(file: FileDescriptorProto) -> list[str]:
    """The description as text; the compiler alone writes JSON names."""
    return [line for line in str(file).splitlines() if "json_name" not in line]
