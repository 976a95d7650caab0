"""Small tokenizers of the kinds that Qwen, Llama 3 and Mistral have, as Hugging Face directories."""
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = ["What is a mixture of experts? A router sends each token to a few experts.", "    for i in range(3):\n        print(i)\n\n",
        "user assistant system think Hello there, how are you? I am well.", "naïve café — ünïcode “quotes” ✓ 你好，世界 🙂"] * 4
# Qwen's and Llama 3's way of cutting text: line ends stay together, whatever comes behind them.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def save(folder, tokenizer, template=None, **config):
    """tokenizer.json and tokenizer_config.json in `folder`, which it returns."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
    if template:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def byte_level(special, vocab=500):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=vocab, special_tokens=special, initial_alphabet=ALPHABET,
                                                            show_progress=False))
    return tokenizer


def qwen(folder, template=None, eos="<|im_end|>"):
    tokenizer = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>")])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return save(folder, tokenizer, template, eos_token=eos, pad_token="<|endoftext|>")


def llama(folder, template=None):
    """Adds <|begin_of_text|> to what it encodes, and leaves spaces out of its tokens' offsets."""
    tokenizer = byte_level(["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
    begin = "<|begin_of_text|>"
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=True),
        processors.TemplateProcessing(single=f"{begin} $A", pair=f"{begin} $A {begin} $B",
                                      special_tokens=[(begin, tokenizer.token_to_id(begin))])])
    return save(folder, tokenizer, template, bos_token=begin, eos_token="<|eot_id|>")


def mistral(folder, template=None):
    """SentencePiece's way: spaces become part of the word behind them, unknown characters become bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always"), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    tokenizer.train_from_iterator(TEXT[:3], trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=[f"<0x{byte:02X}>" for byte in range(256)], show_progress=False))
    state = json.loads(tokenizer.to_str())
    vocab = state["model"]["vocab"]  # the alphabet's entries are characters to the trainer: put whole byte tokens there
    for byte in range(256):
        vocab.setdefault(f"<0x{byte:02X}>", len(vocab))
    return save(folder, Tokenizer.from_str(json.dumps(state)), template, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
