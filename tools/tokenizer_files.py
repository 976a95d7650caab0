"""What a tokenizer's directory and a model's config.json say, and whether they go together."""
import hashlib
import json

import encoding
from user_error import UserError


def read_json(path):
    """The object in a JSON file; {} when there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a value of type {type(content).__name__}, not an object with keys")
    return content


def end_token(folder, tokenizer, given):
    """(token, id, where from) of the end-of-document token, as --eod, tokenizer_config.json or generation_config.json have it."""
    eos = read_json(folder / "tokenizer_config.json").get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    ids = read_json(folder / "generation_config.json").get("eos_token_id")
    ids = ids[0] if isinstance(ids, list) and ids else ids
    if given:
        token, origin = given, "--eod"
    elif eos:
        token, origin = eos, f"eos_token of {folder}/tokenizer_config.json"
    elif isinstance(ids, int):
        token, origin = tokenizer.id_to_token(ids), f"eos_token_id {ids} of {folder}/generation_config.json"
    else:
        raise UserError(f"{folder}: the tokenizer has no end token (eos_token in tokenizer_config.json, or eos_token_id in "
                        "generation_config.json); name the token that ends a document by --eod TOKEN")
    id_ = tokenizer.token_to_id(token) if token is not None else None
    if id_ is None:
        raise UserError(f"{origin} is {token!r}, which is no token of {folder}/tokenizer.json; name one by --eod TOKEN")
    return token, id_, origin


def load(folder):
    """(tokenizer, SHA-256 of tokenizer.json)"""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; --tokenizer wants a directory with tokenizer.json, as Hugging Face's models have it "
                        "(for one with only vocab.json or tokenizer.model: AutoTokenizer.from_pretrained(DIR).save_pretrained(NEW))")
    try:
        return encoding.load(path), hashlib.sha256(path.read_bytes()).hexdigest()
    except Exception as error:  # tokenizers throws no narrower one
        raise UserError(f"{path}: tokenizers can't read it: {error}") from None


def check_model(path, folder, largest):
    """Throws UserError when the model, its directory or config.json, has no row for the tokenizer's largest id."""
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such file; --model wants a model's directory or its config.json")
    vocab = read_json(path).get("vocab_size")
    if not isinstance(vocab, int):
        raise UserError(f"{path} has no vocab_size; --model wants a model's directory or its config.json")
    if largest >= vocab:
        raise UserError(f"the largest id of {folder}/tokenizer.json is {largest}, but the model in {path} has a vocab_size of {vocab}: ids "
                        f"0 to {vocab - 1}; take the model's own tokenizer")
