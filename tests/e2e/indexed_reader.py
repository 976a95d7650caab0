"""A second reader of Megatron's format, written from its description: what tests hold tools' token files against."""
from pathlib import Path

import numpy


def read_indexed(prefix):
    """The documents of <prefix>.bin and <prefix>.idx, each a list of numbers."""
    index = Path(f"{prefix}.idx").read_bytes()
    assert index[:9] == b"MMIDIDX\0\0" and int.from_bytes(index[9:17], "little") == 1
    dtype = {8: numpy.uint16, 4: numpy.int32, 1: numpy.uint8}[index[17]]
    count, entries = (int.from_bytes(index[at:at + 8], "little") for at in (18, 26))
    lengths = numpy.frombuffer(index, numpy.int32, count, 34)
    offsets = numpy.frombuffer(index, numpy.int64, count, 34 + 4 * count)
    documents = numpy.frombuffer(index, numpy.int64, entries, 34 + 12 * count)
    assert len(index) == 34 + 12 * count + 8 * entries
    assert documents.tolist() == list(range(count + 1))
    tokens = Path(f"{prefix}.bin").read_bytes()
    assert len(tokens) == int(lengths.sum()) * dtype().itemsize
    return [numpy.frombuffer(tokens, dtype, length, offset).tolist() for length, offset in zip(lengths, offsets)]
