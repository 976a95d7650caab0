"""Reads all 65,536 bfloat16 patterns of `all.bfloat16` with h5py and with h5dump, and compares them with what they stand for."""

import re
import subprocess
import sys

import h5py
import numpy

path = sys.argv[1]
expected = (numpy.arange(65536, dtype=numpy.uint32) << 16).view(numpy.float32)
usual = numpy.isfinite(expected)

with h5py.File(path) as file:
    dataset = file["all/bfloat16"]
    assert dataset.shape == (256, 256) and dataset.chunks is None and dataset.dtype.kind == "f", dataset
    assert dataset.attrs["name"] == b"all.bfloat16" and dataset.attrs["dtype"] == b"bfloat16", dict(dataset.attrs)
    found = dataset.astype("float32")[...].ravel()
assert numpy.array_equal(numpy.isnan(found), numpy.isnan(expected)), "h5py: NaNs"
assert numpy.array_equal(found[~numpy.isnan(found)], expected[~numpy.isnan(expected)]), "h5py: values"

dump = subprocess.run(["h5dump", "-m", "%.9g", "-y", "-w", "1", "-d", "/all/bfloat16", path], capture_output=True, text=True, check=True).stdout
data = dump[dump.index("DATA {") + 6 : dump.index("ATTRIBUTE")]
shown = numpy.array([float(word) for word in re.findall(r"[-+\w.]+", data)], dtype=numpy.float32)
assert shown.size == 65536, f"h5dump shows {shown.size} values"
assert numpy.array_equal(shown[usual], expected[usual]), "h5dump: values"
print("h5py and h5dump read all bfloat16 patterns right")
