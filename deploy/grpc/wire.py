"""Size of an encoded message in fields, found without decoding it.

Decoding holds the event loop, and its cost is in the number of fields: 8 MiB of text take a millisecond, of strings of one letter
160 ms and fifty times their size in memory.
"""

from __future__ import annotations

from typing import Any

MAX_FIELDS = 8_192  # of a message and the messages in it; `logit_bias` alone may have 4,096
_TINY = 32  # bytes of a message that counts as one field, such as an entry of `logit_bias`
_SMALL = 128 << 10  # bytes of a message that may have any number of fields
_LONGEST = 5  # bytes of a tag or a length, which have 32 bits
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5  # wire types


def check_num_fields(data: bytes, message: Any) -> None:
    """Refuse a message that would take long to decode. Other malformed messages are left to the decoder.

    Args:
        data: the encoded message.
        message: its `Descriptor`, whose type depends on how protobuf is implemented.

    Raises:
        ValueError: it has more than `MAX_FIELDS` fields, or is malformed in a way that could hide them.
    """
    if len(data) <= _SMALL:
        return
    num_fields, parts = 0, [(0, len(data), message)]
    while parts:
        at, end, kind = parts.pop()
        while at < end:
            if (num_fields := num_fields + 1) > MAX_FIELDS:
                raise ValueError(
                    f"a message of more than {_SMALL >> 10} KiB must have at most {MAX_FIELDS} fields (packed numbers are one)"
                )
            tag, at = _varint(data, at)
            length, at = _after_tag(data, tag & 7, at)
            if tag & 7 == _LENGTH and length > _TINY:
                field = kind.fields_by_number.get(tag >> 3)
                if field is not None and field.message_type is not None:
                    parts.append((at, min(at + length, end), field.message_type))
            at += length


def _after_tag(data: bytes, wire_type: int, at: int) -> tuple[int, int]:
    """Return the size of a field's value, and where it begins."""
    if wire_type == _LENGTH:
        return _varint(data, at)
    if wire_type == _VARINT:
        return 0, next((i + 1 for i in range(at, min(at + 10, len(data))) if data[i] < 128), len(data))
    # Groups, which proto3 does not have, count as fields without a value.
    return {_FIXED64: 8, _FIXED32: 4}.get(wire_type, 0), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a tag or a length, and where it ends; 0 and the end of the data if that comes first."""
    value = shift = 0
    for end in range(at, min(at + _LONGEST, len(data))):
        byte = data[end]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, end + 1
        shift += 7
    if at + _LONGEST < len(data):
        raise ValueError(f"the message cannot be decoded: the number at byte {at} has more than {_LONGEST} bytes")
    return 0, len(data)
