"""Megatron's indexed data sets, <prefix>.bin and <prefix>.idx: a writer, a reader, and the joining of many into one.

<prefix>.bin is the tokens of all documents, back to back. <prefix>.idx, little endian:
  0  "MMIDIDX\\0\\0" | 9 u64 version 1 | 17 u8 dtype code | 18 u64 Q sequences | 26 u64 D entries of the document index
  34 i32[Q] length in tokens | i64[Q] byte offset in .bin | i64[D] document index
A sequence is a document here, so that D = Q + 1 and the document index is 0, 1, .. Q.
"""
import contextlib
import os
import shutil
from pathlib import Path

import numpy

from user_error import UserError

MAGIC = b"MMIDIDX\0\0"
HEADER_BYTES = 34
CODES = {1: numpy.uint8, 2: numpy.int8, 3: numpy.int16, 4: numpy.int32, 5: numpy.int64, 8: numpy.uint16}
LONGEST = 2**31 - 1  # tokens of a document: its length is an i32
BLOCK = 1 << 20      # entries of an index, or bytes / 16 of tokens, that merge() holds at a time


def token_dtype(vocab):
    """Megatron's choice for ids 0 .. vocab - 1."""
    return numpy.dtype(numpy.uint16 if vocab < 65500 else numpy.int32)


def partial(path):
    """Where `path` is written before it is whole."""
    return Path(f"{path}.partial")


def publish(paths):
    """Gives files that were written at partial(path) their names, in this order, and makes that last."""
    for path in paths:
        os.replace(partial(path), path)
    folder = os.open(Path(paths[0]).parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def files_of(prefix):
    return [Path(f"{prefix}.bin"), Path(f"{prefix}.idx")]


def flush(file):
    file.flush()
    os.fsync(file.fileno())


def check_length(tokens, where):
    if tokens > LONGEST:
        raise UserError(f"{where}: {tokens} tokens, but a document of Megatron's format has at most {LONGEST} (2^31 - 1): split it")


class Writer:
    """Writes a data set document by document; finish() puts it in its place, whole. Holds the lengths in memory."""

    def __init__(self, prefix, dtype):
        self.prefix, self.dtype = prefix, numpy.dtype(dtype)
        self.lengths, self.tokens = [], 0
        self.bin = open(partial(f"{prefix}.bin"), "wb")

    def add(self, tokens, where="a document"):
        """Appends a document, an array of tokens. `where` names it in errors."""
        check_length(len(tokens), where)
        self.bin.write(numpy.ascontiguousarray(tokens, dtype=self.dtype).data)
        self.lengths.append(len(tokens))
        self.tokens += len(tokens)

    def finish(self):
        flush(self.bin)
        self.bin.close()
        lengths = numpy.array(self.lengths, dtype=numpy.int32)
        write_index(self.prefix, self.dtype, lambda: iter([lengths]))
        publish(files_of(self.prefix))

    def abandon(self):
        """Removes what was written so far."""
        with contextlib.suppress(OSError):  # a full disk has no room for what is still in the buffer
            self.bin.close()
        for path in files_of(self.prefix):
            partial(path).unlink(missing_ok=True)


class Reader:
    """A data set, memory-mapped: len(), [document] and .lengths. Throws UserError where the files contradict each other."""

    def __init__(self, prefix):
        self.prefix = prefix
        bin_path, idx_path = files_of(prefix)
        with idx_path.open("rb") as file:
            header = file.read(HEADER_BYTES)
        code = header[17] if len(header) == HEADER_BYTES else 0
        if header[:9] != MAGIC or int.from_bytes(header[9:17], "little") != 1 or code not in CODES:
            raise UserError(f"{idx_path}: not an index of Megatron's indexed data sets (version 1, with integers)")
        self.dtype = numpy.dtype(CODES[code])
        count, entries = (int.from_bytes(header[at:at + 8], "little") for at in (18, 26))
        rest = idx_path.stat().st_size - HEADER_BYTES - 12 * count - 8 * entries
        if rest not in (0, count):  # one byte for each sequence: modes of multimodal data
            raise UserError(f"{idx_path}: {count} sequences and {entries} entries of the document index do not fit the file's size")
        self.lengths = self._part(idx_path, numpy.int32, count, HEADER_BYTES)
        self.offsets = self._part(idx_path, numpy.int64, count, HEADER_BYTES + 4 * count)
        self.documents = self._part(idx_path, numpy.int64, entries, HEADER_BYTES + 12 * count)
        self.tokens = int(self.lengths.sum(dtype=numpy.int64))
        if bin_path.stat().st_size != self.tokens * self.dtype.itemsize:
            raise UserError(f"{bin_path}: {bin_path.stat().st_size} bytes, but {idx_path} says {self.tokens * self.dtype.itemsize}")
        self.data = self._part(bin_path, self.dtype, self.tokens, 0)

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, document):
        begin = int(self.offsets[document]) // self.dtype.itemsize
        return self.data[begin:begin + int(self.lengths[document])]

    @staticmethod
    def _part(path, dtype, count, offset):
        return numpy.memmap(path, dtype, "r", offset, (count,)) if count else numpy.empty(0, dtype)


def write_index(prefix, dtype, lengths):
    """partial(<prefix>.idx) from lengths(), an iterator over arrays of lengths that gives the same each time it is asked."""
    code = next(code for code, type_ in CODES.items() if numpy.dtype(type_) == dtype)
    count = sum(map(len, lengths()))
    with open(partial(f"{prefix}.idx"), "wb") as file:
        file.write(MAGIC + (1).to_bytes(8, "little") + bytes([code]))
        file.write(count.to_bytes(8, "little") + (count + 1).to_bytes(8, "little"))
        for block in lengths():
            file.write(numpy.ascontiguousarray(block, dtype=numpy.int32).data)
        end = 0
        for block in lengths():
            ends = end + numpy.cumsum(block, dtype=numpy.int64) * dtype.itemsize
            file.write((ends - block.astype(numpy.int64) * dtype.itemsize).data)
            end = int(ends[-1]) if len(ends) else end
        for first in range(0, count + 1, BLOCK):
            file.write(numpy.arange(first, min(first + BLOCK, count + 1), dtype=numpy.int64).data)
        flush(file)


def merge(prefix, pieces, dtype):
    """Writes the documents of the data sets `pieces`, in this order, to partial(<prefix>.bin) and partial(<prefix>.idx), for
    publish(). Memory does not grow with their size."""
    def lengths():
        for piece in pieces:
            reader = Reader(piece)
            if reader.dtype != dtype:
                raise UserError(f"{piece}.idx holds {reader.dtype}, but {prefix} is to be {dtype}")
            for first in range(0, len(reader), BLOCK):
                yield reader.lengths[first:first + BLOCK]

    with open(partial(f"{prefix}.bin"), "wb") as out:
        for piece in pieces:
            with open(f"{piece}.bin", "rb") as file:
                shutil.copyfileobj(file, out, 16 * BLOCK)
        flush(out)
    write_index(prefix, numpy.dtype(dtype), lengths)
