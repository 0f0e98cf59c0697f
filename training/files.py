"""Raw records out of a file or a folder of files, by their number: JSON lines, a JSON array, parquet, arrow.

    raw = opened("pairs.jsonl.gz")     # the first bytes decide how it is read, not the name
    raw[7], raw.place(7), len(raw)     # {...}, "pairs.jsonl.gz, line 8"

A folder is what `datasets` saved to disk, or shards of one kind that are directly in it. gzip is
read whole. Part of train_dpo.py.
"""
if __name__ == "__main__":
    exit("A part of train_dpo.py; run: python train_dpo.py --help")

import gzip
import io
import json
import os
import re
from array import array
from functools import cached_property, lru_cache, partial

import data
from data import UserError, explained

ARROW = b"\xff\xff\xff\xff"                            # a stream of it begins so
DAMAGED, AGAIN = "is not readable parquet or arrow", "fetch it again"
# Not what datasets writes beside its shards. The groups: a split, and the kind of file.
SHARD = re.compile(r"(?!cache-|dataset_|state\.)(?:(train|validation|val|dev|test)(?![a-z]))?.*"
                   r"\.(parquet|arrow|jsonl|json)(?:\.gz)?")


class Lines:
    """JSON lines: only where they begin is in memory. open: gives the file."""
    def __init__(self, path, open):
        self.path, self.open, self.starts, self.numbers, at = path, open, array("q"), array("q"), 0
        with open() as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    self.starts.append(at)
                    self.numbers.append(number)
                at += len(line)

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, k):
        with self.open() as file:
            file.seek(self.starts[k])
            return data.parse(file.readline().rstrip(), self.path, self.numbers[k])

    def place(self, k):
        return f"{self.path}, line {self.numbers[k]}"


class Array(list):
    """A JSON array, or the values of one object {image id: record} (HA-DPO's), read whole."""
    place = Lines.place

    def __init__(self, path, open):
        self.path, self.open = path, open
        with open() as file:
            rows = data.parse(file.read(), path)
        if isinstance(rows, dict):
            rows = [{"image_id": name, **data.as_record(row, path)} for name, row in rows.items()]
        super().__init__(rows)

    @cached_property
    def numbers(self):
        """The line in which each record begins: found when the first fault is to be named."""
        with self.open() as file:
            text = file.read().decode("utf-8-sig")
        decoder, at, end, line, found = json.JSONDecoder(), 0, 0, 1, []
        before = re.compile(r'\s*[\[{,]\s*("[^"]*"\s*:\s*)?')        # a bracket or comma, and the image id
        for _ in self:
            begin = before.match(text, end).end()
            line += text.count("\n", at, begin)
            found.append(line)
            _, end = decoder.raw_decode(text, begin)
            at = begin
        return found


class Table(list):
    """Parquet or arrow: where each record is, by row group; only a few groups of parquet are in memory, and
    arrow, a stream as `datasets` writes it, is one group that is mapped and not read."""
    def __init__(self, path):
        self.path = path
        for group, rows in enumerate(_table(path)):
            self += [(group, row) for row in range(rows)]

    def __getitem__(self, k):
        group, row = super().__getitem__(k)
        found = _table(self.path, group).slice(row, 1)
        with explained(f"{self.place(k)} {DAMAGED}", AGAIN):
            found.validate(full=True)                   # a damaged file may point anywhere
            record, = found.to_pylist()
            return _parsed(record, found.schema)

    def place(self, k):
        return f"{self.path}, record {k + 1}"


def _parsed(value, kind):
    """A value of an arrow type, its JSON parsed: so `datasets` stores what is a text here, a list there."""
    if getattr(kind, "extension_name", "") == "arrow.json" and value is not None:
        return json.loads(value)
    if isinstance(value, dict):
        return {name: _parsed(part, kind.field(name).type) for name, part in value.items()}
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_parsed(part, kind.value_type) for part in value]
    return value


@lru_cache(4)
def _table(path, group=None):
    """The numbers of rows in the groups of a file, or one of its groups as a table. Raises UserError."""
    try:
        from pyarrow import Table, ipc, memory_map, parquet
    except ImportError as error:
        raise UserError(f"{path} needs pyarrow: pip install pyarrow, or convert it to JSON lines") from error
    with explained(f"{path} {DAMAGED}", AGAIN):
        source = memory_map(path)
        if source.read(4) == ARROW:
            source.seek(0)
            table = ipc.open_stream(source).read_all()
            return [len(table)] if group is None else table
        file = parquet.ParquetFile(source)
        if group is None:
            return [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
        return Table.from_batches(file.iter_batches(1000, [group]))         # a piece holds at most 2 GB


class Folder(list):
    """The records of a folder's files, one file after the other in the order of their names."""
    def __init__(self, folder):
        for place in filter(os.path.isdir, (folder, os.path.join(folder, "data"))):        # as on the hub
            names = sorted(filter(SHARD.fullmatch, os.listdir(place)))
            if names:
                break
        if len({SHARD.fullmatch(name).groups() for name in names}) != 1:
            there = ", ".join((names or sorted(os.listdir(folder)))[:4])
            raise UserError(f"{folder} could not be read (Is a directory with {there}): give a file, or a "
                            "folder of parquet, arrow or JSON files of one kind and split")
        self.files = [opened(os.path.join(place, name)) for name in names]
        for file in self.files:
            self += [(file, k) for k in range(len(file))]

    def __getitem__(self, n):
        file, k = super().__getitem__(n)
        return file[k]

    def place(self, n):
        file, k = super().__getitem__(n)
        return file.place(k)


def opened(path):
    """A file's or a folder's raw records. Raises UserError."""
    if os.path.isdir(path):
        return Folder(path)
    read = partial(data.reading, path)
    with read() as file:
        head = file.read(1 << 16)
    if head.startswith(b"\x1f\x8b"):
        with explained(f"{path} cannot be unpacked", AGAIN):
            head = gzip.decompress(data.read_bytes(path))
        read = partial(io.BytesIO, head)
    text = head[:1 << 16].lstrip(b"\xef\xbb\xbf \t\r\n")         # behind a byte-order mark
    if head.startswith((b"PAR1", ARROW)):
        return Table(path)
    kind = "csv or another text"
    if b"\0" in head[:4]:
        kind = "UTF-16"
    elif head.startswith(b"PK"):
        kind = "zip"
    elif re.match(rb'\[|\{\s*"\d+"\s*:\s*\{', text):
        return Array(path, read)
    elif text[:1] in b"{":                              # or empty
        return Lines(path, read)
    raise UserError(f"{path} is {kind}, no JSON or parquet; convert it to JSON lines in UTF-8")
