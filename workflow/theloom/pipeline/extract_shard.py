"""The extract_shard stage: one shard of documents through the model, their hidden states into the
shard writer.

PeakBytes that know nothing of each other's inside: what runs the blocks over one batch (`runner`), the
loop over batches (`batch_loop`), the way of rows to the file (`handoff`). Here they are put
together, by a plan that gets smaller where memory runs out all the same.
"""

import hashlib
import json
import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from theloom.config.auto import store_precision
from theloom.config.frozen import frozen_digest, load_frozen, to_plain
from theloom.corpus import batching, tokens
from theloom.corpus.batching import Lengths
from theloom.devices import gpu
from theloom.engine import interrupts, model_record
from theloom.engine.batch_loop import Work
from theloom.engine.model_record import ModelRecord
from theloom.engine.resident import ResidentJob, load_counted, plan_resident
from theloom.errors import ModelError, StoreError
from theloom.memory.profile import ShardProfile
from theloom.model import weight_format
from theloom.planning import estimate
from theloom.planning.estimate import Estimate
from theloom.planning.plan import Plan, plan_advice
from theloom.store import file_format, provenance
from theloom.store.partial import batches_logged, partial_of
from theloom.store.shard_file import ShardSpec
from theloom.store.writer import ShardWriter

log = logging.getLogger(__name__)


def extract_shard(
    config_path: Path,
    estimate_path: Path,
    model_path: Path,
    tokens_path: Path,
    shard: int,
    output: Path,
    oom_level: int = 0,
) -> None:
    """The extract_shard stage: write the hidden states of one shard of `tokens.h5`, or go on with a
    shard begun.

    `oom_level`: how many times batch and chunk are halved from the start, since earlier jobs ran
    out of memory. Raises HookError, ModelError, MemoryPlanError before the model is loaded, where
    something does not fit; StoppedError where the job is requested to stop.
    """
    frozen = load_frozen(config_path)
    estimated, recorded = estimate.read(estimate_path), model_record.read(model_path)
    shard_tokens = tokens.read_shard(tokens_path, shard)
    points = recorded.catalog.select(frozen.memory.activation_cache_filter)
    store = store_precision(frozen, recorded.precision)
    lengths = np.diff(shard_tokens.window_offset)
    _check_revision(recorded, tokens_path)
    run_fingerprint = _identity(config_path, recorded, tokens_path)
    identity = f"{run_fingerprint}-{shard}"

    def spec_of(planned: Plan, units: int) -> ShardSpec:
        return ShardSpec(
            tokens=shard_tokens,
            points=points,
            keys=tokens.longest_window(tokens_path),
            precision=store,
            batches=units,
            fingerprint=identity,
            attributes=_attributes(config_path, recorded, tokens_path, planned, run_fingerprint)
            | {
                "kind": "shard",
                "shard": shard,
                "first_row": shard_tokens.first_row,
                "precision": store,
            },
            compression=frozen.store.compression.name,
            max_overflow=frozen.store.max_overflow or 0.0,
        )

    if recorded.layerwise:
        from theloom.engine.layerwise.shard import extract_layerwise

        check = partial(_check_streaming, recorded, lengths)
        what = (shard_tokens, points, output, identity, spec_of, check)
        profiled = frozen.memory.profile_shard == shard
        extract_layerwise(frozen, estimated, recorded, *what, profiled, oom_level)
        return
    fitting = plan_resident(frozen, estimated, recorded, Lengths((lengths,)), output, identity)
    planned = fitting.plan
    _check_streaming(recorded, lengths, planned.chunk_size)
    batches = batching.plan_batches(
        lengths, planned.batch_tokens, planned.chunk_size, planned.streamed_windows
    )
    spec = spec_of(planned, len(batches))
    needed = _still_to_write(spec, estimated, output)
    estimate.check_disk(output.parent, needed, shutil.disk_usage(output.parent).free)
    first = batches_logged(output, identity)
    if first == len(batches):
        with ShardWriter(output, spec) as writer:
            if writer.batches_done == len(batches):
                writer.finish()
                return
    loaded, watch = load_counted(frozen, recorded, points)
    largest = (
        batching.largest(batches, first, planned.chunk_size)
        if frozen.memory.profile_shard == shard
        else ()
    )
    work = Work(
        batches,
        shard_tokens,
        points,
        store,
        loaded.device,
        fitting.components.allocated if loaded.device.type == "cuda" else fitting.components.total,
        frozen.memory.memory_warning_threshold,
    )
    job = ResidentJob(
        work, loaded, watch, spec, output, ShardProfile(loaded, output, largest), recorded.causal
    )
    kind = weight_format.weight_format_of(frozen, recorded.precision, recorded.quantization).name

    def advice(smallest: Plan) -> str:
        found, _ = gpu.available_memory(loaded.device)
        return plan_advice(
            estimated, kind, loaded.device.type, found, smallest, recorded.correction
        )

    cut = partial(planned.backed_off, streams=recorded.streams)
    interrupts.until_it_fits(
        lambda level: job.run(cut(level), level), cut, oom_level, loaded.device, advice
    )


def _check_revision(recorded: ModelRecord, tokens_path: Path) -> None:
    """The tokens are of the commit that the model is of: a hub's branch may move between two jobs."""
    corpus = tokens.attributes(tokens_path)
    name, found, expected = (
        corpus["tokenizer"],
        corpus["tokenizer_revision"],
        recorded.attributes["revision"],
    )
    if name == recorded.attributes["source"] and found != expected:
        raise StoreError(
            f"tokens.h5 is of revision {found} of {name}, and model.h5 of {expected}; "
            "set model.revision, or run again with --forcerun tokenize_corpus load_model"
        )


def _check_streaming(recorded: ModelRecord, lengths: np.ndarray, chunk_size: int) -> None:
    longest = int(lengths.max(initial=0))
    if longest > chunk_size and not recorded.streams:
        raise ModelError(
            f"{recorded.attributes['model_class']} cannot be streamed ({recorded.attributes['not_streamed']}), and a "
            f"document has {longest} tokens; "
            f"set memory.streaming_chunk_size={longest} or corpus.context_length={chunk_size}"
        )


def _still_to_write(spec: ShardSpec, estimated: Estimate, output: Path) -> int:
    """Bytes that the shard will take beyond what an unfinished file of it already has."""
    partial = partial_of(output)
    there = partial.stat().st_blocks * 512 if partial.exists() else 0
    return max(0, spec.rows * estimated.row_bytes[spec.precision] - there)


def _identity(config_path: Path, recorded: ModelRecord, tokens_path: Path) -> str:
    """A hash of all that decides the rows of a run: config, model, tokens, versions of what
    computes.

    The plan is not in it: how a shard is cut into batches differs by rounding alone, and each file
    records its own.
    """
    corpus = tokens.attributes(tokens_path)
    parts = {
        "config": frozen_digest(config_path),
        "model": [recorded.fingerprint, recorded.precision, recorded.attributes["attention"]],
        "tokens": [corpus["corpus_hash"], corpus["tokens_hash"]],
        "versions": [
            provenance.attributes("")["package_versions"].get(p) for p in ("torch", "transformers")
        ],
        "format": file_format.FORMAT_VERSION,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _attributes(
    config_path: Path, recorded: ModelRecord, tokens_path: Path, plan: Plan, identity: str
) -> dict[str, Any]:
    """Where the rows come from. `config` holds, by stage, all keys that had a say in them."""
    corpus = tokens.attributes(tokens_path)
    names = (
        "tokenizer",
        "tokenizer_revision",
        "corpus",
        "corpus_hash",
        "empty_documents",
        "truncated_from",
    )
    return provenance.attributes(
        "activations",
        run_fingerprint=identity,
        config={
            "model": json.loads(recorded.attributes["config"]),
            "tokens": json.loads(corpus["config"]),
            "extract": to_plain(load_frozen(config_path)),
        },
        batch_tokens=plan.batch_tokens,
        chunk_size=plan.chunk_size,
        execution="layerwise" if recorded.layerwise else "resident",
        streamed_windows=plan.streamed_windows,
        kv_cache="offloaded" if plan.offloaded else "device",
        context_length=corpus["context_length"],
        device=recorded.attributes["device"],
        **model_record.provenance_of(recorded),
        **{name: corpus[name] for name in names},
    )
