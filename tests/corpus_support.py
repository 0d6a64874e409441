"""A tokenizer of bytes, quick to load, for tests of corpora."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BYTES = 256  # its ids without added tokens


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
