"""What a worker of tools/preprocess does: the documents of a shard become a small data set of its own, a piece."""
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy
from tokenizers import Tokenizer

import documents
import indexed
from user_error import UserError

BATCH_CHARACTERS = 1 << 20  # of text that is encoded at once, for each thread
COUNTS = ("documents", "tokens", "rows", "empty", "learned")  # what a piece reports of itself


@dataclass
class Recipe:
    tokenizer: Path
    end: int          # id of the end-of-document token; None: none is appended
    largest: int      # id
    key: str
    split_on: str
    special_tokens: bool
    template: object  # chat.Template; None: texts

    @property
    def dtype(self):
        return indexed.token_dtype(self.largest + 1)


def load(path):
    """The tokenizer without the truncation and padding that its file may ask for."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def write_json(path, content):
    """Whole or not at all."""
    try:
        with open(indexed.partial(path), "w") as file:
            file.write(json.dumps(content, indent=2) + "\n")
            indexed.flush(file)
        indexed.publish([path])
    finally:
        indexed.partial(path).unlink(missing_ok=True)


def start(recipe_, counters_, stop_):
    """Once in a worker process."""
    global recipe, counters, stop, tokenizer, threads, ends_itself
    recipe, counters, stop = recipe_, counters_, stop_
    threads = int(os.environ["RAYON_NUM_THREADS"])
    tokenizer = load(recipe.tokenizer)
    tokenizer.encode_special_tokens = not (recipe.special_tokens or recipe.template)
    if recipe.template:
        tokenizer.post_processor = None  # it adds nothing here, but may trim spaces off the offsets
    ends_itself = tokenizer.encode("a").ids[-1:] == [recipe.end]


def encode_shard(shard, prefix):
    """Writes the data set `prefix` (and `prefix`.mask for conversations), then <prefix>.json, which says that it is whole and what is in
    it. Throws UserError naming file and line."""
    writer = indexed.Writer(prefix, recipe.dtype)
    masks = indexed.Writer(f"{prefix}.mask", "uint8") if recipe.template else None
    report = dict.fromkeys(COUNTS, 0)
    try:
        for batch in batches(shard, report):
            if stop.is_set():
                return
            if recipe.template:
                add_chats(batch, writer, masks, report)
            else:
                add_texts(batch, writer)
            with counters.get_lock():
                counters[1] += writer.tokens - report["tokens"]
            report["tokens"] = writer.tokens
        report["documents"] = len(writer.lengths)
        for one in (masks, writer):
            if one:
                one.finish()
        write_json(Path(f"{prefix}.json"), report)
    finally:
        for one in (masks, writer):
            if one:
                one.abandon()


def batches(shard, report):
    """Lists of (Place, text), or of (Place, text, answers), of about BATCH_CHARACTERS per thread."""
    batch, characters, shown = [], 0, 0

    def progress(here):
        nonlocal shown
        with counters.get_lock():
            counters[0] += here - shown
        shown = here

    columns = ("messages", "conversations", "tools") if recipe.template else (recipe.key,)
    for place, row in documents.read(shard, columns, recipe.split_on, progress):
        report["rows"] += 1
        if recipe.template:
            new = [(place, *document) for document in recipe.template.documents(row, place, recipe.special_tokens)]
        else:
            new = [(place, row if isinstance(row, str) else text_of(row, place))]
            if not new[0][1]:
                report["empty"] += 1
                continue
        batch += new
        characters += sum(len(document[1]) for document in new)
        if characters >= BATCH_CHARACTERS * threads:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def text_of(row, place):
    if recipe.key not in row:
        raise UserError(f'{place}: no key "{recipe.key}"; it has {", ".join(map(repr, row)) or "none"}: choose one by --key')
    if not isinstance(row[recipe.key], str):
        kind = "null" if row[recipe.key] is None else type(row[recipe.key]).__name__
        raise UserError(f'{place}: "{recipe.key}" is {kind}, not text')
    return row[recipe.key]


def encode(batch, encode_batch, add_special_tokens):
    try:
        return encode_batch([document[1] for document in batch], add_special_tokens=add_special_tokens)
    except (TypeError, UnicodeEncodeError):
        for place, text, *_ in batch:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"{place}: the text has half of a surrogate pair, \\u{ord(text[error.start]):04x}, which is no character; "
                                "whatever wrote the file cut it") from None
        raise


def with_end(ids):
    return ids if recipe.end is None or ends_itself else [*ids, recipe.end]


def add_texts(batch, writer):
    for (place, _), encoding in zip(batch, encode(batch, tokenizer.encode_batch_fast, True)):
        writer.add(numpy.array(with_end(encoding.ids), dtype=recipe.dtype), place)


def add_chats(batch, writer, masks, report):
    from chat import learned
    for (place, _, answers), encoding in zip(batch, encode(batch, tokenizer.encode_batch, False)):
        tokens = numpy.array(with_end(encoding.ids), dtype=recipe.dtype)
        mask = numpy.zeros(len(tokens), dtype=numpy.uint8)
        mask[:len(encoding.ids)] = learned(encoding.offsets, answers)
        writer.add(tokens, place)
        masks.add(mask, place)
        report["learned"] += int(mask.sum())
