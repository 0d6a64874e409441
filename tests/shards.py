"""Specifications of small shards, for tests of the store."""

import h5py
import numpy as np
from theloom.hooks.points import residual_points
from theloom.store import file_format, provenance
from theloom.store.shard_file import ShardSpec, ShardTokens

POINTS = residual_points(1, 8)
LENGTHS = [3, 1, 5]


def spec(precision="fp32", fingerprint="me", lengths=LENGTHS, batches=None, **others) -> ShardSpec:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype("<i8")
    rows = int(offsets[-1])
    tokens = ShardTokens(
        first_row=0,
        input_ids=np.arange(rows, dtype="<i4"),
        document=np.repeat(np.arange(len(lengths), dtype="<i4"), lengths),
        position=np.concatenate(
            [np.arange(n, dtype="<i4") for n in lengths] or [np.array([], "<i4")]
        ),
        document_offset=offsets,
        document_id=file_format.fixed_strings([f"d{n}" for n in range(len(lengths))]),
        window_offset=offsets,
        window_document=np.arange(len(lengths), dtype="<i4"),
    )
    attributes = provenance.attributes(
        "activations", kind="shard", shard=0, first_row=0, precision=precision
    )
    batches = len(lengths) if batches is None else batches
    return ShardSpec(tokens, POINTS, 5, precision, batches, fingerprint, attributes, **others)


def all_but_metrics(path) -> bytes:
    """The whole file, metadata included, without the seconds that its job took and their
    checksum.
    """
    raw = bytearray(path.read_bytes())
    with h5py.File(path) as file:
        for name, first in (("metrics", 0), ("checksums", 3)):
            offset, size = file[name].id.get_offset(), file[name].id.get_storage_size()
            raw[offset + 8 * first : offset + size] = bytes(size - 8 * first)
    return bytes(raw)
