"""Tokenizers that are quick to load: of bytes, and of the first tokens of another one."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BYTES = 256  # its ids without added tokens
FIRST = 4096


def byte_tokenizer(folder: Path, added: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Save a tokenizer whose tokens are the bytes of UTF-8; `added` tokens have the ids after."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    if added:
        fast.add_tokens(list(added))
    fast.save_pretrained(folder)
    return fast


def first_tokens(source: Path, folder: Path) -> None:
    """Save `tokenizer.json` with the first tokens alone: a whole one takes 0.2 s of every run."""
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    model = content["model"]
    model["vocab"] = {token: n for token, n in model["vocab"].items() if n < FIRST}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
