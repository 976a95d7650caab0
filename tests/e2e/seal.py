"""Makes a checkpoint that was changed by hand consistent again: checksums, sizes, digests. For tests of what checksums do not see."""
import json

import h5py
import numpy as np
import xxhash
from check_schema import SCHEMA, blocks_of, digest_of, dtype_of, tensors_of, texts_of

WORDS = {"float32": "Float", "bfloat16": "BFloat16", "int64": "Long"}


def seal_tensors(path):
    """Writes the checksums of a file anew; returns what the manifest says of it."""
    schema = json.loads((SCHEMA / "tensors.json").read_text())
    form, sums, said, count, total = schema["checksums"], [], b"", 0, 0
    with h5py.File(path) as file, open(path, "rb") as data:
        for place in sorted((place for place, _ in tensors_of(path)), key=lambda place: place.replace("/", ".")):
            dataset = file[place]
            dtype = dtype_of(dataset, schema["dtypes"])
            said += f"{place.replace('/', '.')}\n{WORDS.get(dtype, dtype)}\n[{', '.join(map(str, dataset.shape))}]\n".encode()
            count, total = count + 1, total + dataset.id.get_type().get_size() * dataset.size
            for begin, end in blocks_of(dataset, form):
                data.seek(dataset.id.get_offset() + begin)
                sums.append(xxhash.xxh3_64_intdigest(data.read(end - begin)))
                said += sums[-1].to_bytes(8, "little")
    with h5py.File(path, "r+") as file:
        if form["path"] in file:
            del file[form["path"]]
        stored = file.create_dataset(form["path"], data=np.array(sums, np.uint64))
        stored.attrs["algorithm"], stored.attrs["block_bytes"] = np.bytes_(form["algorithm"]), np.bytes_(str(form["block_bytes"]))
    return {"count": count, "bytes": total, "digest": xxhash.xxh3_128_hexdigest(said)}


def seal(step, change=lambda manifest: None):
    """Lets `change` have the manifest, when all else in it is right."""
    path = step / "manifest.json"
    manifest = json.loads(path.read_text())
    for file in step.glob("*.h5"):
        manifest["tensors"][file.name] = seal_tensors(file)
    manifest["files"] = {str(p.relative_to(step)): p.stat().st_size for p in step.rglob("*") if p.is_file() and p != path}
    manifest["texts"] = texts_of(step)
    change(manifest)
    path.write_text(json.dumps(manifest | {"digest": digest_of(manifest)}))
