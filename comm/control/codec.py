"""Encoding of the control channel's messages, which are named arrays.

Little endian; every part starts at a multiple of 8 bytes:

    u32 length of the schema | u32 0 | schema | i64 dimensions of all arrays, one after the other | array | array | ...

The schema is JSON, `[[name, dtype, number of dimensions], ...]`. It is the same in most steps, so both
sides cache what they have written or parsed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

_HEAD = struct.Struct("<II")
_PADDING = tuple(bytes(n) for n in range(8))
_KINDS = "biufc"  # bool, integers, floats, complex


def pack(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return one message of named arrays of a primitive dtype and any shape.

    Raises:
        ValueError: an array is structured, of objects, of strings or of dates.
    """
    values = tuple(arrays.values())
    schema = _schema(tuple(arrays), tuple([value.dtype for value in values]), tuple([value.ndim for value in values]))
    dims = [size for value in values for size in value.shape]
    parts: list[bytes | memoryview] = [schema, struct.pack(f"<{len(dims)}q", *dims)]
    for value in values:
        parts.append(value.data if value.flags.c_contiguous else value.tobytes())
        if padding := -value.nbytes & 7:
            parts.append(_PADDING[padding])
    return b"".join(parts)


def unpack(buffer: bytes | bytearray | memoryview) -> dict[str, np.ndarray]:
    """Return the arrays of a message, as views of `buffer`, which must be aligned to 8 bytes.

    Raises:
        ValueError: `buffer` is not a message.
    """
    try:
        length, _ = _HEAD.unpack_from(buffer)
        at = _HEAD.size + length + (-length & 7)
        fields, num_dims = _parse(bytes(memoryview(buffer)[_HEAD.size : _HEAD.size + length]))
        dims = struct.unpack_from(f"<{num_dims}q", buffer, at)
        at += 8 * num_dims
        arrays = {}
        taken = 0
        for name, dtype, ndim in fields:
            array = np.ndarray(dims[taken : taken + ndim], dtype, buffer, at)
            taken += ndim
            at += (array.nbytes + 7) & -8
            arrays[name] = array
    except (struct.error, TypeError, ValueError) as error:
        raise ValueError(f"malformed control message of {len(buffer)} bytes: {error}") from error
    return arrays


@lru_cache(64)
def _schema(names: tuple[str, ...], dtypes: tuple[np.dtype, ...], ndims: tuple[int, ...]) -> bytes:
    for name, dtype in zip(names, dtypes, strict=True):
        if dtype.kind not in _KINDS:
            raise ValueError(f"array {name!r} has dtype {dtype}; allowed are booleans and numbers")
    fields = [[name, dtype.str, ndim] for name, dtype, ndim in zip(names, dtypes, ndims, strict=True)]
    text = json.dumps(fields, separators=(",", ":")).encode()
    return _HEAD.pack(len(text), 0) + text + _PADDING[-len(text) & 7]


@lru_cache(64)
def _parse(schema: bytes) -> tuple[tuple[tuple[str, np.dtype, int], ...], int]:
    fields = tuple((name, np.dtype(dtype), ndim) for name, dtype, ndim in json.loads(schema))
    for name, dtype, _ in fields:
        if dtype.kind not in _KINDS:
            raise ValueError(f"array {name!r} has dtype {dtype}; allowed are booleans and numbers")
    return fields, sum(ndim for _, _, ndim in fields)
