"""The documents in files of JSON lines, plain text and Parquet, in shards that can be read one by one, in any order, anywhere."""
import glob
import gzip
import io
import json
import os
import stat
import zlib
from dataclasses import dataclass
from pathlib import Path

from user_error import UserError

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".txt": "text", ".text": "text", ".md": "text",
           ".parquet": "parquet"}
COMPRESSED = (".gz", ".zst")


@dataclass(frozen=True)
class Source:
    """An input file as it was when it was listed."""
    path: str
    format: str
    bytes: int
    modified: int  # nanoseconds

    def check(self):
        """Throws UserError when the file has changed since."""
        now = os.stat(self.path)
        if (now.st_size, now.st_mtime_ns) != (self.bytes, self.modified):
            raise UserError(f"{self.path} has changed while it was read; run again when nothing writes to it")


@dataclass(frozen=True)
class Shard:
    """Whole files, or of one file the lines that begin in [begin, end), or the row groups [begin, end)."""
    sources: tuple
    begin: int
    end: int
    bytes: int


@dataclass
class Place:
    """Where a document came from, for messages: line `number` after byte `begin`, or row `number`; 0: the whole file."""
    path: str
    unit: str = "line"
    number: int = 0
    begin: int = 0

    def __str__(self):
        if not self.number:
            return self.path
        before = 0
        if self.begin:  # a shard does not know how many lines those before it have
            with open(self.path, "rb") as file:
                left = self.begin
                while left > 0 and (block := file.read(min(left, 1 << 24))):
                    before, left = before + block.count(b"\n"), left - len(block)
        return f"{self.path}, {self.unit} {before + self.number}"


def find(inputs, format_):
    """The Sources that files, directories and patterns stand for: in the given order, sorted inside a directory or pattern.
    `format_`: one of FORMATS' values for all files, None to go by their names."""
    sources = {}
    for name in inputs:
        if os.path.isdir(name):
            paths = sorted(os.path.join(folder, file) for folder, _, files in os.walk(name, onerror=fail) for file in files
                           if not any(part.startswith(".") for part in (Path(folder).relative_to(name) / file).parts))
            paths = [path for path in paths if format_ or format_of(path)]
            if not paths:
                raise UserError(f"{name}: no file in this directory ends in {', '.join(FORMATS)}, or one of these and "
                                f"{' or '.join(COMPRESSED)}; --format takes all files")
        elif os.path.lexists(name):
            paths = [name]
        else:
            paths = sorted(glob.glob(name, recursive=True))
            paths = [path for path in paths if not os.path.isdir(path)]
            if not paths:
                raise UserError(f"{name}: no such file" + (", and nothing matches it" if glob.has_magic(name) else ""))
        for path in paths:
            key = os.path.realpath(path)
            if key in sources:
                raise UserError(f"{path} is given twice (as {sources[key].path}): its documents would count double")
            sources[key] = source(path, format_)
    return list(sources.values())


def fail(error):
    raise error


def format_of(path):
    stem, ending = os.path.splitext(path)
    return FORMATS.get((os.path.splitext(stem)[1] if ending in COMPRESSED else ending).lower())


def source(path, format_):
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is not a regular file; a pipe or device can't be read again when a run is continued")
    if status.st_size == 0:
        raise UserError(f"{path} is empty; remove it or leave it out")
    if not (format_ or format_of(path)):
        raise UserError(f"{path}: its name does not say what it is ({', '.join(FORMATS)}, each with {' or '.join(COMPRESSED)} behind "
                        "it or not); say so by --format")
    return Source(path, format_ or format_of(path), status.st_size, status.st_mtime_ns)


def cut(sources, shard_bytes):
    """Shards of about `shard_bytes`, a function of the files alone. Compressed files and texts are not cut."""
    shards, texts = [], []

    def close_texts():
        if texts:
            shards.append(Shard(tuple(texts), 0, 0, sum(text.bytes for text in texts)))
            texts.clear()

    for one in sources:
        if one.format == "text" and sum(text.bytes for text in texts) + one.bytes <= shard_bytes:
            texts.append(one)
            continue
        close_texts()
        if one.format == "parquet":
            shards += cut_parquet(one, shard_bytes)
        elif one.format == "jsonl" and not one.path.endswith(COMPRESSED):
            for begin in range(0, one.bytes, shard_bytes):
                end = min(begin + shard_bytes, one.bytes)
                shards.append(Shard((one,), begin, end, end - begin))
        else:
            shards.append(Shard((one,), 0, one.bytes, one.bytes))
    close_texts()
    return shards


def cut_parquet(one, shard_bytes):
    groups = open_parquet(one.path).metadata
    if groups.num_row_groups == 0:
        raise UserError(f"{one.path} has no row groups, and so no documents; remove it or leave it out")
    begin, size = 0, 0
    for group in range(groups.num_row_groups):
        size += groups.row_group(group).total_byte_size
        if size >= shard_bytes or group == groups.num_row_groups - 1:
            share = one.bytes * (group + 1 - begin) // groups.num_row_groups
            yield Shard((one,), begin, group + 1, share)
            begin, size = group + 1, 0


def open_parquet(path):
    import pyarrow
    import pyarrow.parquet
    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a Parquet file, or damaged: {error}") from None


def read(shard, columns, split_on, progress):
    """Yields (Place, row) of every document: a row is a dict of JSON lines or Parquet (with `columns` alone, those of them that are
    there), or the text. progress(bytes): how much of shard.bytes was read so far."""
    done = 0
    for one in shard.sources:
        reader = {"jsonl": read_lines, "text": read_text, "parquet": read_parquet}[one.format]
        try:
            for document in reader(one, shard, columns, split_on, lambda here: progress(done + here)):
                yield document
        except (EOFError, zlib.error, OSError) as error:
            raise UserError(f"{one.path} is damaged or was cut off: {error}") from None
        one.check()
        done += one.bytes
    progress(shard.bytes)


def opened(path):
    """(stream of the uncompressed bytes, file below it)"""
    raw = open(path, "rb")
    if path.endswith(".gz"):
        return gzip.open(raw), raw
    if path.endswith(".zst"):
        import pyarrow
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"), 1 << 20), raw
    return raw, raw


def read_lines(one, shard, columns, split_on, progress):
    file, raw = opened(one.path)
    with raw:
        position, end = shard.begin, shard.end if file is raw else None
        if position:  # the line that goes over the border belongs to the shard before
            file.seek(position - 1)
            position += len(file.readline()) - 1
        place = Place(one.path, "line", 0, position)
        while end is None or position < end:
            line = file.readline()
            if not line:
                break
            position += len(line)
            place = Place(one.path, "line", place.number + 1, place.begin)
            if line.isspace():
                continue
            row = json_row(line, place)
            progress(raw.tell() if end is None else position - shard.begin)
            yield place, row


def json_row(line, place):
    text = decode(line, place)
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        array = ": one object a line is wanted, not an array over many (jq -c '.[]' makes it so)" if line.lstrip()[:1] == b"[" else ""
        raise UserError(f"{place} is not JSON{array}: {error.msg} at column {error.colno}") from None
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{place} can't be read as JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{place}: the JSON is nested too deeply") from None
    if not isinstance(row, dict):
        raise UserError(f"{place} is of type {type(row).__name__}; an object with keys is wanted, one on each line")
    return row


def decode(data, place):
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = place if place.number else Place(place.path, "line", data.count(b"\n", 0, error.start) + 1)
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise UserError(f"{where}: not UTF-8: byte 0x{data[error.start]:02x} at byte {column} of the line; convert the file "
                        "(iconv -t utf-8) or repair the line") from None


def read_text(one, shard, columns, split_on, progress):
    file, raw = opened(one.path)
    with raw:
        text = decode(file.read(), Place(one.path))
    progress(one.bytes)
    if split_on is None:
        yield Place(one.path), text
        return
    first, part = 1, []
    for number, line in enumerate([*text.split("\n"), split_on], 1):
        if line.rstrip("\r") != split_on:
            part.append(line)
            continue
        if part:
            yield Place(one.path, "line", first), "\n".join(part)
        first, part = number + 1, []


def read_parquet(one, shard, columns, split_on, progress):
    import pyarrow
    file = open_parquet(one.path)
    there = [name for name in columns if name in file.schema_arrow.names]
    if not there:
        raise UserError(f"{one.path} has no column {' or '.join(columns)}; it has {', '.join(file.schema_arrow.names)}: choose one by --key")
    groups = range(shard.begin, shard.end)
    first = sum(file.metadata.row_group(group).num_rows for group in range(shard.begin))
    rows, number = sum(file.metadata.row_group(group).num_rows for group in groups), 0
    try:
        for batch in file.iter_batches(1024, row_groups=list(groups), columns=there):
            for row in batch.to_pylist():
                number += 1
                yield Place(one.path, "row", first + number), row
            progress(shard.bytes * number // max(rows, 1))
    except pyarrow.ArrowException as error:
        raise UserError(f"{one.path} is damaged: {error}") from None
