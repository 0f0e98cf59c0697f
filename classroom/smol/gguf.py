"""A GGUF file as numpy arrays: the parts of the format that SmolLM2's file uses, read by hand.

    fields, tensors = gguf.read("SmolLM2-135M-Instruct.Q4_1.gguf")
    fields["llama.block_count"]            30
    tensors["blk.0.attn_q.weight"]         float32 (576, 576), dequantised

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Tensors are F32, F16, Q8_0 (32 int8 and
a scale) or Q4_1 (32 halves of a byte, a scale and a minimum). Everything else is refused in a sentence.
"""
if __name__ == "__main__":
    exit("A part of classroom/make.py; run: python classroom/make.py --help")

import struct
from typing import NamedTuple

import numpy as np

from data import UserError

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
F32, F16, Q4_1, Q8_0 = 0, 1, 3, 8
BLOCK = {F32: (1, 4), F16: (1, 2), Q4_1: (32, 20), Q8_0: (32, 34)}     # values, bytes
PLAIN = {F32: "<f4", F16: "<f2"}
MOST = 1 << 24                                                         # entries of an array, bytes of a text


class Reader:
    """A place in the bytes of a file, which only moves on."""

    def __init__(self, content):
        self.content = content
        self.at = 0

    def take(self, count):
        """The next bytes, so many. Raises UserError if there are fewer."""
        start = self.at
        self.at += count
        if self.at > len(self.content):
            raise UserError("the GGUF file ends too early: install the package again")
        return self.content[start:self.at]

    def number(self, form):
        """The next number, of one of struct's forms."""
        form = "<" + form
        size = struct.calcsize(form)
        value, = struct.unpack(form, self.take(size))
        return value

    def text(self):
        """The next text: its length, its bytes."""
        length = min(self.number("Q"), MOST)
        raw = self.take(length)
        return bytes(raw).decode("utf-8")

    def value(self, kind):
        """The next value of a kind: a number, a text, or a list that says what it is of."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            raise UserError(f"the GGUF file has a value of the unknown kind {kind}: give another")
        inner = self.number("I")
        count = self.number("Q")
        if count > MOST:
            raise UserError(f"the GGUF file has a list of {count} entries: give another")
        return [self.value(inner) for _ in range(count)]

    def info(self):
        """The next tensor's entry."""
        name = self.text()
        axes = self.number("I")
        shape = [self.number("Q") for _ in range(axes)]
        shape.reverse()                                               # the format has the fastest axis first
        kind = self.number("I")
        offset = self.number("Q")
        return Info(name, shape, kind, offset)


class Info(NamedTuple):
    name: str
    shape: list      # in PyTorch's order
    kind: int
    offset: int      # bytes from the first tensor's


def read(path):
    """-> ({field: value}, {tensor: float32 array in PyTorch's order of axes}). Raises UserError."""
    content = np.memmap(path, np.uint8, "r")
    reader = Reader(memoryview(content))
    magic = bytes(reader.take(4))
    if magic != b"GGUF" or reader.number("I") not in (2, 3):
        raise UserError(f"{path} is no GGUF file of version 2 or 3: give another")
    number_of_tensors = reader.number("Q")
    number_of_fields = reader.number("Q")
    fields = {}
    for _ in range(number_of_fields):
        name = reader.text()
        kind = reader.number("I")
        fields[name] = reader.value(kind)
    infos = [reader.info() for _ in range(number_of_tensors)]
    step = fields.get("general.alignment", 32)
    start = -(-reader.at // step) * step
    tensors = {}
    for info in infos:
        tensors[info.name] = _tensor(content, start, info)
    return fields, tensors


def _tensor(content, start, info):
    """A tensor's values; the first tensor begins at `start`."""
    name, shape, kind, offset = info
    if kind not in BLOCK:
        raise UserError(f"the tensor {name} is of kind {kind}: only F32, F16, Q8_0 and Q4_1 are read")
    values, size = BLOCK[kind]
    count = int(np.prod(shape, dtype=np.int64))
    at = start + offset
    length = count // values * size
    raw = content[at:at + length]
    if count % values or len(raw) != length:
        raise UserError(f"the tensor {name} does not fit into the GGUF file: install the package again")
    if kind in PLAIN:
        return numbers(raw, PLAIN[kind]).reshape(shape)
    blocks = raw.reshape(-1, size)
    return dequantised(blocks, kind).reshape(shape)


def numbers(raw, form):
    """Bytes that are floating-point numbers, as float32."""
    return raw.view(form).astype(np.float32)


def dequantised(blocks, kind):
    """Blocks of bytes (N, 20 or 34) -> float32 (N, 32)."""
    first = blocks[:, :2].copy()
    scale = numbers(first, "<f2")                                                     # (N, 1)
    if kind == Q8_0:
        return scale * blocks[:, 2:].view(np.int8)
    second = blocks[:, 2:4].copy()
    least = numbers(second, "<f2")                                                    # (N, 1)
    halves = blocks[:, 4:]
    low, high = halves & 15, halves >> 4
    return scale * np.concatenate([low, high], 1) + least
