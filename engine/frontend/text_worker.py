"""A process that tokenises what clients send and renders their chats, so that nothing of it can hold up or end a front.

`text_workers` starts it, sends it one task at a time, and kills it when a task takes too long.
"""

from __future__ import annotations

import json
import resource
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil

from expertwire.comm.control.channel import ChannelClosed, SocketChannel
from expertwire.engine import process
from expertwire.engine.config.engine_config import ModelInfo
from expertwire.engine.frontend.chat import JSON_FIELDS, ChatText
from expertwire.engine.frontend.prompts import check_length, tokenize
from expertwire.engine.frontend.tokenizer import Tokenizer

_LARGE = 256 << 10  # bytes of a task after which the worker's memory is worth returning
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class WorkerArgs:
    """Arguments of a worker.

    Args:
        folder: of the model.
        info: the model's limits.
        link: descriptor of the socket to the front.
        memory_bytes: memory that it may use beyond what its tokenizer takes.
        max_chars: most characters of a rendered chat.
    """

    folder: str
    info: ModelInfo
    link: int
    memory_bytes: int
    max_chars: int


def worker_main(args: WorkerArgs) -> None:
    """Answer tasks until the front closes the link; entry point of the process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tokenizer = Tokenizer.open(args.folder)
    limit = psutil.Process().memory_info().data + args.memory_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    process.lower_priority()
    link = SocketChannel(socket.socket(fileno=args.link), max_pending=None)
    link.send({"ready": np.zeros(0, np.uint8)})
    try:
        while True:
            task = link.recv(None)
            assert task is not None, "without a timeout there is a task"
            link.send(_answer(task, tokenizer, args))
            if sum(array.nbytes for array in task.values()) > _LARGE:
                del task
                process.return_memory()  # a hundred times the task's text
    except ChannelClosed:
        return


def prompt_task(prompt: str | ChatText) -> dict[str, np.ndarray]:
    """Return the task to tokenise a prompt. The answer has its `tokens`, i32, no more than the model can take."""
    if isinstance(prompt, str):
        return {"text": to_bytes(prompt), "_": to_bytes(json.dumps({"kind": "prompt"}))}
    long = {name: to_bytes(value) for name, value in prompt.fields.items() if name in JSON_FIELDS}
    fields = {name: value for name, value in prompt.fields.items() if name not in JSON_FIELDS}
    return {**long, "_": to_bytes(json.dumps({"kind": "chat", "fields": fields}))}


def tokenize_task(text: str, add_special_tokens: bool) -> dict[str, np.ndarray]:
    """Return the task to tokenise a text. The answer has its `tokens`, i32, at most `max_model_len`."""
    return {
        "text": to_bytes(text),
        "_": to_bytes(json.dumps({"kind": "tokenize", "add_special_tokens": add_special_tokens})),
    }


def detokenize_task(tokens: np.ndarray, skip_special_tokens: bool) -> dict[str, np.ndarray]:
    """Return the task to decode tokens. The answer has their `text`, UTF-8."""
    return {
        "tokens": tokens,
        "_": to_bytes(json.dumps({"kind": "detokenize", "skip_special_tokens": skip_special_tokens})),
    }


def to_bytes(text: str) -> np.ndarray:
    """Return a text as UTF-8, u8."""
    return np.frombuffer(text.encode(), np.uint8)


def to_text(data: np.ndarray) -> str:
    """Return the text in UTF-8."""
    return data.tobytes().decode()


def _answer(task: Arrays, tokenizer: Tokenizer, args: WorkerArgs) -> dict[str, np.ndarray]:
    """Return the answer to a task: what its function says, or an `error`: a gRPC code, a line end, and a message."""
    plain: dict[str, Any] = json.loads(to_text(task["_"]))
    try:
        if plain["kind"] == "detokenize":
            text = tokenizer.decode(task["tokens"].tolist(), plain["skip_special_tokens"])
            return {"text": to_bytes(text)}
        if plain["kind"] == "tokenize":
            tokens = tokenizer.encode(to_text(task["text"]), plain["add_special_tokens"])
            if len(tokens) > args.info.max_model_len:
                raise ValueError(f"text has {len(tokens)} tokens; max_model_len allows {args.info.max_model_len}")
            return {"tokens": np.array(tokens, np.int32)}
        tokens = tokenize(_prompt(plain, task), tokenizer, args.max_chars)
        check_length(len(tokens), args.info)
        return {"tokens": np.array(tokens, np.int32)}
    except ValueError as error:
        return {"error": to_bytes(f"INVALID_ARGUMENT\n{error}")}
    except MemoryError:
        return {"error": to_bytes(f"INVALID_ARGUMENT\n{too_large(args.memory_bytes)}")}


def too_large(memory_bytes: int) -> str:
    """Return the message for a prompt that takes too much memory."""
    return f"prompt: to render and tokenise it must take at most {memory_bytes >> 20} MiB of memory"


def _prompt(plain: Mapping[str, Any], task: Arrays) -> str | ChatText:
    if plain["kind"] == "prompt":
        return to_text(task["text"])
    return ChatText(fields={**plain["fields"], **{name: to_text(task[name]) for name in JSON_FIELDS if name in task}})
