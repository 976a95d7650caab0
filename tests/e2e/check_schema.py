#!/usr/bin/env python3
"""Holds a checkpoint against checkpoints-schema/. Usage: check_schema.py CHECKPOINT; exit code 1 and a line for every problem."""
import json
import math
import re
import sys
from pathlib import Path

import h5py
import xxhash

SCHEMA = Path(__file__).resolve().parents[2] / "checkpoints-schema"
KINDS = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float)}
KEYWORDS = {"$schema", "title", "type", "required", "properties", "additionalProperties", "items", "const", "enum", "minimum", "minLength", "maxItems"}


def violations(value, schema, where):
    """The part of JSON Schema that manifest.schema.json uses; a keyword that is not understood is an error, not a pass."""
    assert schema.keys() <= KEYWORDS, f"the schema uses {schema.keys() - KEYWORDS}, which this checker does not know"
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and (isinstance(value, bool) or not any(isinstance(value, KINDS[kind]) for kind in kinds)):
        return [f"{where}: {value!r} is no {' or '.join(kinds)}"]
    found = []
    if "const" in schema and value != schema["const"]:
        found.append(f"{where}: {value!r} is not {schema['const']!r}")
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{where}: {value!r} is none of {schema['enum']}")
    if "minimum" in schema and value < schema["minimum"]:
        found.append(f"{where}: {value} is below {schema['minimum']}")
    if "minLength" in schema and len(value) < schema["minLength"]:
        found.append(f"{where}: too short")
    if "maxItems" in schema and len(value) > schema["maxItems"]:
        found.append(f"{where}: {len(value)} items, more than {schema['maxItems']}")
    if isinstance(value, list):
        for i, item in enumerate(value):
            found += violations(item, schema.get("items", {}), f"{where}[{i}]")
    if isinstance(value, dict):
        found += [f"{where}: '{key}' is missing" for key in schema.get("required", []) if key not in value]
        for key, item in value.items():
            rest = schema.get("additionalProperties", {})
            inner = schema.get("properties", {}).get(key, rest)
            found += [f"{where}: '{key}' is unknown"] if inner is False else violations(item, inner, f"{where}.{key}")
    return found


def digest_of_text(text):
    """Of a manifest without its digest, as README.md of the schema says; numbers as they are written, since two programs may write one in two ways."""
    rest = json.loads(text, parse_float=lambda number: "\0" + number)
    rest.pop("digest", None)
    plain = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return xxhash.xxh3_128_hexdigest(re.sub(r'"\\u0000([^"]+)"', r"\1", plain).encode())


def digest_of(manifest):
    """The same, of one that is about to be written."""
    return digest_of_text(json.dumps(manifest))


def texts_of(checkpoint):
    """The digest of every file without tensors, by name."""
    return {str(path.relative_to(checkpoint)): xxhash.xxh3_128_hexdigest(path.read_bytes())
            for path in checkpoint.rglob("*") if path.is_file() and path.suffix != ".h5" and path.name != "manifest.json"}


def dtype_of(dataset, dtypes):
    kind = dataset.id.get_type()
    if not isinstance(kind, h5py.h5t.TypeFloatID):
        return str(dataset.dtype)
    form = {"size": kind.get_size(), "fields": list(kind.get_fields()), "exponent_bias": kind.get_ebias()}
    little = kind.get_order() == h5py.h5t.ORDER_LE and kind.get_norm() == h5py.h5t.NORM_IMPLIED
    return next((name for name, known in dtypes.items() if known == form and little), f"float {form}")


def tensors_of(path):
    tensors = {}
    with h5py.File(path) as file:
        file.visititems(lambda place, item: tensors.update({place: item}) if isinstance(item, h5py.Dataset) else None)
        yield from ((place, item) for place, item in tensors.items() if place != ".checksums")


def blocks_of(dataset, form):
    """Byte ranges of a tensor's blocks."""
    size = dataset.id.get_type().get_size()
    row = size * (dataset.shape[-1] if len(dataset.shape) > 1 else 1)
    rows, aligned = max(1, form["block_bytes"] // max(row, 1)), form["page"] // math.gcd(form["page"], row)
    rows -= rows % aligned if rows >= aligned else 0
    total = size * math.prod(dataset.shape)
    return [(begin, min(begin + rows * row, total)) for begin in range(0, total, rows * row)]


def check_sums(path, form):
    """The blocks of a file whose stored checksum is not that of its bytes."""
    with h5py.File(path) as file, open(path, "rb") as data:
        stored, found = file[form["path"]], []
        attributes = {"algorithm": form["algorithm"].encode(), "block_bytes": str(form["block_bytes"]).encode()}
        if stored.dtype != form["dtype"] or dict(stored.attrs) != attributes:
            found.append(f"{path.name}: {form['path']} is {stored.dtype} with {dict(stored.attrs)}")
        sums = iter(stored[...].tolist())
        for place in sorted((place for place, _ in tensors_of(path)), key=lambda place: place.replace("/", ".")):
            offset = file[place].id.get_offset()
            for begin, end in blocks_of(file[place], form):
                data.seek(offset + begin)
                if xxhash.xxh3_64_intdigest(data.read(end - begin)) != next(sums, None):
                    found.append(f"{path.name}: {place}: bytes {begin} to {end} of the tensor have another checksum")
        return found + ([f"{path.name}: more checksums than blocks"] if next(sums, None) is not None else [])


def check_file(path, rules, schema):
    """Problems of one file, and its tensors: their bytes by name."""
    problems, names = [], {}
    for place, dataset in tensors_of(path):
        name, dtype = place.replace("/", "."), dtype_of(dataset, schema["dtypes"])
        where = f"{path.name}: {name}"
        names[name] = dataset.id.get_type().get_size() * dataset.size
        allowed = ["float32"] if re.search(schema["always_float32"], name) else rules["dtypes"]
        if dtype not in allowed:
            problems.append(f"{where}: {dtype} is none of {allowed}")
        if sorted(dataset.attrs) != sorted(schema["attributes"]):
            problems.append(f"{where}: attributes {sorted(dataset.attrs)}")
        elif (dataset.attrs["name"], dataset.attrs["dtype"]) != (name.encode(), dtype.encode()):
            problems.append(f"{where}: attributes say {dict(dataset.attrs)}")
        if dataset.chunks or dataset.compression or dataset.id.get_offset() is None:
            problems.append(f"{where}: not contiguous")
    return problems + check_sums(path, schema["checksums"]), names


def check_index(path, parts):
    """Of tensors that are divided among `parts`, each its file and names: nothing but a link to each."""
    links = {}
    with h5py.File(path) as file:
        file.visititems_links(lambda place, link: None if isinstance(link, h5py.HardLink) and isinstance(file[place], h5py.Group)
                              else links.update({place: (getattr(link, "filename", None), getattr(link, "path", None))}))
    wanted = {name.replace(".", "/"): (part.name, "/" + name.replace(".", "/")) for part, names in parts for name in names}
    return [] if links == wanted else [f"{path.name}: its links are {links}, not {wanted}"]


def check_kind(checkpoint, file, rules, schema, stated):
    """Problems of one kind of tensor, in one file or in several behind an index, and the names."""
    problems, parts, bytes_by_name = [], [], {}
    several = sorted(checkpoint.glob(f"{Path(file).stem}-?????-of-?????.h5"))
    for part in several or [checkpoint / file]:
        found, names = check_file(part, rules, schema)
        problems += found + [f"{part.name}: {name} is in two files" for name in names.keys() & bytes_by_name.keys()]
        parts.append((part, names))
        bytes_by_name |= names
    if several:
        problems += check_index(checkpoint / file, parts)
        if [path.name for path in several] != [f"{Path(file).stem}-{i + 1:05}-of-{len(several):05}.h5" for i in range(len(several))]:
            problems.append(f"{file}: its parts are {[path.name for path in several]}")
    total = {"count": len(bytes_by_name), "bytes": sum(bytes_by_name.values())}
    if {key: stated[key] for key in total} != total:
        problems.append(f"{file}: {total}, the manifest says {stated}")
    return problems, bytes_by_name.keys()


def check(checkpoint):
    """All problems of a checkpoint, one line each."""
    written = (checkpoint / "manifest.json").read_text()
    manifest = json.loads(written)
    problems = violations(manifest, json.loads((SCHEMA / "manifest.schema.json").read_text()), "manifest.json")
    if manifest.get("digest") != digest_of_text(written):
        problems.append("manifest.json: its digest is that of something else")
    schema = json.loads((SCHEMA / "tensors.json").read_text())
    files = {str(path.relative_to(checkpoint)): path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()}
    del files["manifest.json"]
    if files != manifest["files"]:
        problems.append(f"files: {files}, the manifest says {manifest['files']}")
    texts = texts_of(checkpoint)
    if texts != manifest["texts"]:
        problems.append(f"texts: {texts}, the manifest says {manifest['texts']}")
    if len({name in files for name in schema["together"]}) != 1:
        problems.append(f"only one of {schema['together']} is there")
    names = {}
    for file in sorted(name for name in files if name.endswith(".h5") and not re.search(r"-\d{5}-of-\d{5}\.h5$", name)):
        if file not in schema["files"]:
            problems.append(f"{file} is not in tensors.json")
            continue
        found, names[file] = check_kind(checkpoint, file, schema["files"][file], schema, manifest["tensors"].get(file))
        problems += found
    for file, rules in schema["files"].items():
        if file not in names:
            problems += [f"{file} is missing"] if rules["required"] else []
        elif names[file] - names["weights.h5"] or (rules["parameters"] == "all" and names[file] != names["weights.h5"]):
            problems.append(f"{file}: not the parameters of weights.h5")
    return problems


if __name__ == "__main__":
    lines = check(Path(sys.argv[1]))
    print("\n".join(lines) if lines else f"{sys.argv[1]}: as checkpoints-schema says")
    sys.exit(bool(lines))
