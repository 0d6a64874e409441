"""Embeddings of sequences: ESM, bio_embeddings, ProtT5 and scikit-bio.

All leave out special tokens, so that row r of a sequence is its residue r.
"""

import json
from collections.abc import Iterator

import numpy as np

from theloom.dataset import token_text
from theloom.errors import ConfigError
from theloom.exports.job import Job, Unit, safe_names
from theloom.hooks.points import LAST_STATE
from theloom.store.hdf5.output import written


def _of_one_window(job: Job, name: str) -> list[Unit]:
    """The documents, each of which the model saw at once."""
    counts = np.bincount([w.document for w in job.windows], minlength=job.acts.document_count)
    cut = next((n for n, count in enumerate(counts) if count > 1), None)
    if cut is not None:
        raise ConfigError(
            f"{name}: document {job.acts.document_id_of(cut)!r} was cut into {counts[cut]} "
            "windows, whose rows do not know of each other; extract it with a longer "
            "corpus.context_length"
        )
    return job.documents


def _residues(job: Job, unit: Unit) -> np.ndarray:
    """The rows of a document that are no special tokens."""
    rows = np.arange(unit.rows.start, unit.rows.stop)
    return rows if job.acts.pooled else rows[~job.special(unit.rows)]


def _layer(job: Job, hook: str) -> int:
    """The number that ESM gives a hook point: its last layer is after the final norm."""
    if hook == LAST_STATE:
        return job.last_layer
    number = job.number_of_layer(hook)
    if number is None:
        raise ConfigError(
            f"esm numbers layers of the residual stream; {hook} is not of it (the last is "
            f"{LAST_STATE})"
        )
    if number == job.last_layer:
        raise ConfigError(
            f"esm's layer {number} is after the final norm: give {LAST_STATE} in place of {hook}"
        )
    return number


def write_esm(job: Job) -> None:
    """Write `<id>.pt` for each sequence: its representations, their means, and those of the first
    special token.

    Args:
        job: the export.

    Raises:
        ConfigError: not every token has a row, two ids make one name, or a hook point is none of
            the residual stream.
    """
    job.need_every_token("esm")
    layers = {_layer(job, hook): hook for hook in job.hooks}
    documents = _of_one_window(job, "esm")
    names = safe_names([job.acts.document_id_of(d.document) for d in documents])
    for unit, name in zip(documents, names, strict=True):
        if job.is_done(f"{name}.pt"):
            continue
        special = job.special(unit.rows)
        found = {layer: job.rows(hook, unit.rows) for layer, hook in layers.items()}
        record: dict[str, object] = {
            "label": job.acts.document_id_of(unit.document),
            "representations": {n: rows[~special].clone() for n, rows in found.items()},
            "mean_representations": {
                n: rows[~special].float().mean(dim=0).to(rows.dtype) for n, rows in found.items()
            },
        }
        if special[0]:
            record["bos_representations"] = {n: rows[0].clone() for n, rows in found.items()}
        job.write_torch(f"{name}.pt", record)
    if job.acts.columns:
        job.leave_out(f"the columns {', '.join(job.acts.columns)}")


def _embeddings(job: Job, name: str) -> Iterator[tuple[str, np.ndarray]]:
    """The id of each document, and its embedding: (residues, width), of pooled rows (width,)."""
    hook = job.need_one_hook(name)
    if job.dtype == "bf16":
        job.leave_out("bfloat16, which NumPy lacks: rows are float32")
    if job.acts.columns:
        job.leave_out(f"the columns {', '.join(job.acts.columns)}")
    assert job.width
    for unit in _of_one_window(job, name):
        found = job.array(hook, _residues(job, unit))
        if job.acts.pooled and len(found) > 1:
            raise ConfigError(f"{name}: a document has several rows; extract rows.by=document")
        yield job.acts.document_id_of(unit.document), found[0] if job.acts.pooled else found


def write_bio_embeddings(job: Job) -> None:
    """Write `embeddings_file.h5`, of pooled rows `reduced_embeddings_file.h5`: a data set for each
    sequence, by number, with its id as the attribute `original_id`.

    Args:
        job: the export.
    """
    name = "reduced_embeddings_file.h5" if job.acts.pooled else "embeddings_file.h5"
    if job.is_done(name):
        return
    with job.writing(name) as path, written(path) as file:
        for number, (of, rows) in enumerate(_embeddings(job, "bio-embeddings")):
            file.create_dataset(str(number), data=rows).attrs["original_id"] = of
            file.check()


def write_prott5(job: Job) -> None:
    """Write `embeddings.h5`: a data set for each sequence, by its id with `/` and `.` as `_`.

    Args:
        job: the export.
    """
    if job.is_done("embeddings.h5"):
        return
    ids = [job.acts.document_id_of(d.document) for d in job.documents]
    names = dict(zip(ids, safe_names(ids, "/."), strict=True))
    with job.writing("embeddings.h5") as path, written(path) as file:
        for of, rows in _embeddings(job, "prott5"):
            file.create_dataset(names[of], data=rows)
            file.check()


def write_scikit_bio(job: Job) -> None:
    """Write `embeddings.h5` as scikit-bio's format `embed` has it, whose `id` is the sequences
    themselves, and `ids.json` with the documents' ids in the same order.

    Args:
        job: the export.

    Raises:
        ConfigError: rows are pooled, or a token is no single letter.
    """
    if job.acts.pooled:
        raise ConfigError("scikit-bio's embed holds a row for each residue; rows are pooled")
    if job.is_done("embeddings.h5"):
        return
    letters, ends, ids = bytearray(), [], []
    with job.writing("embeddings.h5") as path, written(path) as file:
        values = file.create_dataset(
            "embedding",
            (0, job.width),
            job.numpy_dtype,
            maxshape=(None, job.width),
            chunks=True,
            compression="gzip",
        )
        units = zip(job.documents, _embeddings(job, "scikit-bio"), strict=True)
        for unit, (of, rows) in units:
            letters += _sequence(job, unit, of)
            ids.append(of)
            ends.append(len(letters))
            values.resize(len(letters), axis=0)
            values[len(letters) - len(rows) :] = rows
            file.check()
        file["id"] = np.frombuffer(letters, np.uint8)
        file["idptr"] = np.array(ends, np.int64)
        dtype = str(values.dtype)
        file.attrs.update(
            {"format": "embedding", "format-version": "1.0", "dtype": dtype, "dim": job.width}
        )
    job.write_text("ids.json", json.dumps(ids, ensure_ascii=False, indent=0))
    job.leave_out("ids of documents, which are in ids.json: scikit-bio names rows by sequences")


def _sequence(job: Job, unit: Unit, of: str) -> bytes:
    """The letters of a document's residues."""
    texts = token_text.texts(job.acts, job.acts.input_ids.numpy(_residues(job, unit)))
    letters = [text.strip() for text in texts]
    wrong = next((t for t in letters if len(t) != 1 or not t.isascii()), None)
    if wrong is not None:
        raise ConfigError(
            f"scikit-bio takes sequences of letters; document {of!r} has the token {wrong!r}"
        )
    return "".join(letters).encode()
