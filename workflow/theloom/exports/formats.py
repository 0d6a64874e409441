"""The formats that hidden states are exported to."""

from collections.abc import Callable
from dataclasses import dataclass

from theloom.exports import crosscoder, draft_models, plain, proteins, saelens
from theloom.exports.job import Job


@dataclass(frozen=True)
class Format:
    """A format.

    Args:
        write: writes an export.
        reader: who reads it.
        contexts: whether it has contexts of one length.
        ids: whether it has one token id a row.
    """

    write: Callable[[Job], None]
    reader: str
    contexts: bool = False
    ids: bool = False


FORMATS = {
    "saelens": Format(saelens.write, "SAELens, as cached activations", contexts=True, ids=True),
    "crosscoder": Format(crosscoder.write, "crosscoder_learning", ids=True),
    "speculators": Format(draft_models.write_speculators, "speculators (vLLM)", ids=True),
    "specforge": Format(draft_models.write_specforge, "SpecForge, EAGLE-3", ids=True),
    "esm": Format(proteins.write_esm, "programs for ESM's extract.py"),
    "bio-embeddings": Format(proteins.write_bio_embeddings, "bio_embeddings"),
    "prott5": Format(proteins.write_prott5, "programs for ProtT5's embedder"),
    "scikit-bio": Format(proteins.write_scikit_bio, "scikit-bio, format embed"),
    "npy": Format(plain.write_npy, "NumPy"),
    "safetensors": Format(plain.write_safetensors, "safetensors"),
    "parquet": Format(plain.write_parquet, "pandas, Polars, DuckDB, datasets"),
}
