"""Exports read by the code of those whom they are for, where `.venv-peers` has it: their
requirements differ from ours.
"""

import subprocess

import pytest
from support import ROOT

PYTHON = ROOT / ".venv-peers/bin/python"
SAELENS = """
import sys
import numpy as np
import torch
from sae_lens.training.activations_store import ActivationsStore
folder, hook, expected = sys.argv[1:]
rows = np.load(expected).reshape(-1, 5, 64)
store = ActivationsStore(
    model=torch.nn.Identity(), dataset=None, streaming=False, hook_name=hook, hook_head_index=None,
    context_size=5, d_in=64, n_batches_in_buffer=2, total_training_tokens=len(rows) * 5,
    store_batch_size_prompts=1, train_batch_size_tokens=5, prepend_bos=True,
    normalize_activations="none", device=torch.device("cpu"), dtype="float32",
    cached_activations_path=folder,
)
for row in rows:
    found, _ = store.get_raw_llm_batch()
    assert np.array_equal(found.numpy().reshape(5, 64), row)
print(len(rows), "contexts")
"""
SKBIO = """
import sys
import numpy as np
import skbio.io
from skbio import ProteinEmbedding
found = skbio.io.read(sys.argv[1], format="embed", constructor=ProteinEmbedding)
expected = np.load(sys.argv[2])
both = list(found)
assert [str(one) for one in both] == ["MKTAYIAKQR", "MWLLV", "M"]
assert np.array_equal(np.concatenate([one.embedding for one in both]), expected)
print(len(both), "embeddings")
"""


def read_by(module, script, *arguments):
    """Run a script with a library of others; skips the test where there is none."""
    if not PYTHON.exists() or subprocess.run([PYTHON, "-c", f"import {module}"]).returncode:
        pytest.skip(f"{PYTHON.parents[1].name} has no {module}")
    done = subprocess.run([PYTHON, "-c", script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
