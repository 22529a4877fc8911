"""Checks of ONNX files before onnxruntime reads them, since a stranger may have made them.

A graph is a program. One without loops, branches and functions of its own comes to an end, and one
without external data reads no other file. How long a pass takes and how much memory is left to the
graph: see docs/reliability.md.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from crosstill.errors import CorruptError

DOMAINS = ("", "ai.onnx")  # of ONNX itself: others are code that somebody has added
_GRAPH, _FUNCTIONS = 7, 25  # fields of ModelProto, as onnx.proto numbers them
_NODE, _TENSOR, _SPARSE = 1, 5, 15  # of GraphProto
_ATTRIBUTE, _DOMAIN = 5, 7  # of NodeProto
_TENSORS, _GRAPHS, _SPARSES = (5, 10), (6, 11), (22, 23)  # of AttributeProto
_EXTERNAL = (13, 14)  # of TensorProto: external_data, data_location


class _Field(NamedTuple):
    """One field of a protobuf message: a number, or the span of its bytes."""

    number: int
    value: int
    start: int
    end: int


def check(path: Path) -> None:
    """Refuse a graph that can run without end, call other code, or read another file.

    Raises:
        CorruptError: it can, or it is no ONNX file.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for field in _fields(data, 0, len(data)):
                if field.number == _FUNCTIONS:
                    raise ValueError("it has functions of its own")
                if field.number == _GRAPH:
                    _check_graph(data, field)
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise CorruptError(
            f"{path}: not a graph as crosstill exports it ({error}); export the student anew"
        ) from None


def _check_graph(data: mmap.mmap, graph: _Field) -> None:
    for field in _fields(data, graph.start, graph.end):
        if field.number == _NODE:
            _check_node(data, field)
        elif field.number == _TENSOR:
            _check_tensor(data, field)
        elif field.number == _SPARSE:
            raise ValueError("it has sparse tensors")


def _check_node(data: mmap.mmap, node: _Field) -> None:
    for field in _fields(data, node.start, node.end):
        if field.number == _DOMAIN:
            domain = data[field.start : field.end].decode()
            if domain not in DOMAINS:
                raise ValueError(f"it calls {domain[:80]!r}")
        elif field.number == _ATTRIBUTE:
            for part in _fields(data, field.start, field.end):
                if part.number in _GRAPHS:
                    raise ValueError("it has loops or branches")
                if part.number in _SPARSES:
                    raise ValueError("it has sparse tensors")
                if part.number in _TENSORS:
                    _check_tensor(data, part)


def _check_tensor(data: mmap.mmap, tensor: _Field) -> None:
    for field in _fields(data, tensor.start, tensor.end):
        if field.number in _EXTERNAL and (field.value or field.end > field.start):
            raise ValueError("it reads another file")


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[_Field]:
    """Walk over the fields of a message that fills these bytes."""
    while at < end:
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        value, start = 0, at
        if kind == 0:
            value, at = _varint(data, at)
            start = at
        elif kind in (1, 5):
            at = start = at + (8 if kind == 1 else 4)
        elif kind == 2:
            length, start = _varint(data, at)
            at = start + length
        else:
            raise ValueError("not protobuf")
        if at > end:
            raise ValueError("cut short")
        yield _Field(number, value, start, at)


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    """Return a number and where it ends."""
    value = shift = 0
    while shift < 70:
        byte = data[at]
        value |= (byte & 127) << shift
        shift, at = shift + 7, at + 1
        if byte < 128:
            return value, at
    raise ValueError("not protobuf")
