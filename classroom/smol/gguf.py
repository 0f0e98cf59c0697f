"""A GGUF file as numpy arrays: the parts of the format that SmolLM2's file uses, read by hand.

    fields, tensors = gguf.read("SmolLM2-135M-Instruct.Q4_1.gguf")
    fields["llama.block_count"]            30
    tensors["blk.0.attn_q.weight"]         float32 (576, 576), dequantised

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Tensors are F32, F16, Q8_0 (32 int8 and
a scale) or Q4_1 (32 halves of a byte, a scale and a minimum). Everything else is refused in a sentence.
"""
if __name__ == "__main__":
    exit(print("A part of classroom/make.py; run: python classroom/make.py --help"))

import struct

import numpy as np

from data import UserError

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
F32, F16, Q4_1, Q8_0 = 0, 1, 3, 8
BLOCK = {F32: (1, 4), F16: (1, 2), Q4_1: (32, 20), Q8_0: (32, 34)}     # values, bytes
MOST = 1 << 24                                                         # entries of an array, bytes of a text


class Reader:
    """A place in the bytes of a file, which only moves on."""

    def __init__(self, content):
        self.content, self.at = content, 0

    def take(self, count):
        if count > len(self.content) - self.at:
            raise UserError("the GGUF file ends too early: install the package again")
        self.at += count
        return self.content[self.at - count:self.at]

    def number(self, form):
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def text(self):
        return bytes(self.take(min(self.number("Q"), MOST))).decode("utf-8")

    def value(self, kind):
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            raise UserError(f"the GGUF file has a value of the unknown kind {kind}: give another")
        inner, count = self.number("I"), self.number("Q")
        if count > MOST:
            raise UserError(f"the GGUF file has a list of {count} entries: give another")
        return [self.value(inner) for _ in range(count)]


def read(path):
    """-> ({field: value}, {tensor: float32 array in PyTorch's order of axes}). Raises UserError."""
    content = np.memmap(path, np.uint8, "r")
    reader = Reader(memoryview(content))
    if bytes(reader.take(4)) != b"GGUF" or reader.number("I") not in (2, 3):
        raise UserError(f"{path} is no GGUF file of version 2 or 3: give another")
    tensors, fields = reader.number("Q"), {}
    for _ in range(reader.number("Q")):
        name = reader.text()
        fields[name] = reader.value(reader.number("I"))
    infos = []
    for _ in range(tensors):
        name = reader.text()
        shape = [reader.number("Q") for _ in range(reader.number("I"))]
        infos.append((name, shape[::-1], reader.number("I"), reader.number("Q")))
    step = fields.get("general.alignment", 32)
    start = -(-reader.at // step) * step
    return fields, {name: _tensor(content, start + offset, shape, kind, name)
                    for name, shape, kind, offset in infos}


def _tensor(content, at, shape, kind, name):
    if kind not in BLOCK:
        raise UserError(f"the tensor {name} is of kind {kind}: only F32, F16, Q8_0 and Q4_1 are read")
    values, size = BLOCK[kind]
    count = int(np.prod(shape, dtype=np.int64))
    raw = content[at:at + count // values * size]
    if count % values or len(raw) * values != count * size:
        raise UserError(f"the tensor {name} does not fit into the GGUF file: install the package again")
    if kind == F32:
        return raw.view("<f4").astype(np.float32).reshape(shape)
    if kind == F16:
        return raw.view("<f2").astype(np.float32).reshape(shape)
    return dequantised(raw.reshape(-1, size), kind).reshape(shape)


def dequantised(blocks, kind):
    """Blocks of bytes (N, 20 or 34) -> float32 (N, 32)."""
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)                      # (N, 1)
    if kind == Q8_0:
        return scale * blocks[:, 2:].view(np.int8)
    least = blocks[:, 2:4].copy().view("<f2").astype(np.float32)
    halves = blocks[:, 4:]
    return scale * np.concatenate([halves & 15, halves >> 4], 1) + least     # low halves come first
