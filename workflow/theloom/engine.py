"""The extraction engine: one shard of documents through the model, their hidden states into the shard writer.

Two parts that know nothing of each other's inside: the loop over batches (`extract_shard`), and what runs the blocks
over one batch (`ResidentRunner`: the whole model stays on the device).
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from theloom import batching, config, estimate, gpu, layout, memory, model, model_record, plan, provenance, tokens
from theloom.batching import Batch
from theloom.errors import ModelError, StoreError
from theloom.estimate import Estimate
from theloom.forward import prefill
from theloom.hooks import HookPoint
from theloom.memory_profile import ShardProfile
from theloom.model import LoadedModel
from theloom.model_record import ModelRecord
from theloom.plan import Plan
from theloom.precision import torch_dtype
from theloom.schema import Config
from theloom.shard import ShardSpec, ShardWriter, begun, partial_of
from theloom.taps import Taps
from theloom.tokens import ShardTokens

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10
FIGURES = ("seconds", "waited", "bytes_read", "tokens", "blocks")  # of layerwise.Swept

# called with a hook point's name, the first position of a chunk, and its values (window, position, …) on the CPU
Sink = Callable[[str, int, "torch.Tensor"], None]


class ResidentRunner:
    """Runs batches through a model that is on the device as a whole."""

    def __init__(self, loaded: LoadedModel, points: list[HookPoint], chunk_size: int, store: str) -> None:
        self._loaded, self._points, self._chunk_size = loaded, points, chunk_size
        self._dtype = torch_dtype(store)

    def run(self, ids: "torch.Tensor", sink: Sink, captured: "Callable[[torch.Tensor], None] | None" = None) -> None:
        """Forward token ids (window, position), padded on the right; hand every chunk of every hook point to `sink`.

        Values leave the device, in the stored dtype, as soon as they exist; `captured` sees each of them before.
        """
        position = dict.fromkeys((p.name for p in self._points), 0)
        over_keys = {p.name for p in self._points if p.over_keys}

        def hand_over(name: str, value: "torch.Tensor") -> None:
            stored = value.to(self._dtype)
            if captured is not None:
                captured(stored)
            rows = stored.cpu()
            if name in over_keys:  # (window, head, position, key): a row is a position's
                rows = rows.transpose(1, 2)
            sink(name, position[name], rows)
            position[name] += rows.shape[1]

        with Taps(self._loaded.architecture, self._points, hand_over) as taps:
            prefill(taps, ids, self._chunk_size)


def extract_shard(
    config_path: Path, estimate_path: Path, model_path: Path, tokens_path: Path, shard: int, output: Path
) -> None:
    """The extract_shard stage: write the hidden states of one shard of `tokens.h5`, or go on with a shard begun.

    Raises HookError, ModelError, MemoryPlanError before the model is loaded, where something does not fit.
    """
    frozen = config.thaw(config_path)
    estimated, recorded = estimate.read(estimate_path), model_record.read(model_path)
    shard_tokens = tokens.read_shard(tokens_path, shard)
    points = recorded.catalogue.select(frozen.memory.activation_cache_filter)
    store = recorded.precision if frozen.store.dtype.name == "auto" else frozen.store.dtype.name
    lengths = np.diff(shard_tokens.window_offset)
    _check_revision(recorded, tokens_path)
    run_identity = _identity(config_path, recorded, tokens_path)
    identity = f"{run_identity}-{shard}"

    def spec_of(planned: Plan, units: int) -> ShardSpec:
        return ShardSpec(
            tokens=shard_tokens,
            points=points,
            keys=tokens.longest_window(tokens_path),
            precision=store,
            batches=units,
            identity=identity,
            attributes=_attributes(config_path, recorded, tokens_path, planned, run_identity)
            | {"kind": "shard", "shard": shard, "first_row": shard_tokens.first_row, "precision": store},
            figures=FIGURES if recorded.layerwise else (),
        )

    if recorded.layerwise:
        from theloom import layerwise_shard

        check = partial(_check_streaming, recorded, lengths)
        layerwise_shard.extract(frozen, estimated, recorded, shard_tokens, points, output, identity, spec_of, check)
        return
    planned = _plan(frozen, estimated, recorded, int(lengths.max(initial=1)), output, identity)
    _check_streaming(recorded, lengths, planned.chunk_size)
    batches = batching.plan_batches(lengths, planned.batch_tokens, planned.chunk_size)
    spec = spec_of(planned, len(batches))
    needed = _still_to_write(spec, estimated, output)
    estimate.check_disk(output.parent, needed, shutil.disk_usage(output.parent).free)
    with ShardWriter(output, spec) as writer:
        if writer.batches_done < len(batches):
            loaded = model_record.load_again(frozen, recorded)
            runner = ResidentRunner(loaded, points, planned.chunk_size, store)
            asked = frozen.memory.profile_shard == shard
            largest = batching.largest(batches, writer.batches_done, planned.chunk_size) if asked else ()
            profile = ShardProfile(loaded, output, largest)
            _extract(runner, batches, shard_tokens, writer, frozen.memory.memory_warning_threshold, loaded, profile)
        writer.finish()


def _plan(
    frozen: Config, estimated: Estimate, recorded: ModelRecord, longest: int, output: Path, identity: str
) -> Plan:
    """What fits the device now; a shard that was begun is gone on with as it was begun."""
    device, _ = model.resolve_precision(frozen)
    kind, unfinished = memory.kind_of(frozen, recorded.precision), begun(output, identity)
    if unfinished is None:
        threshold = frozen.memory.memory_warning_threshold
        return model_record.fit(estimated, kind, device, threshold, longest, recorded.correction).plan
    as_begun = Plan(int(unfinished["batch_tokens"]), int(unfinished["chunk_size"]), longest)
    found, _ = gpu.available(device)
    name = partial_of(output).name
    plan.check_begun(estimated, kind.name, device.type, found, as_begun, recorded.correction, name)
    return as_begun


def _extract(
    runner: ResidentRunner,
    batches: list[Batch],
    shard_tokens: ShardTokens,
    writer: ShardWriter,
    warning_threshold: float,
    loaded: LoadedModel,
    profile: ShardProfile,
) -> None:
    """The loop over batches, from the first that is not committed yet."""
    done = sum(sum(b.lengths) for b in batches[: writer.batches_done])
    begun = said = time.perf_counter()
    padding, first, warned = 0, done, False
    for number in range(writer.batches_done, len(batches)):
        batch = batches[number]
        ids = batching.padded(batch, shard_tokens.input_ids, shard_tokens.window_offset)

        def write(name: str, start: int, values: "torch.Tensor", batch: Batch = batch) -> None:
            for row, (window, length) in enumerate(zip(batch.windows, batch.lengths, strict=True)):
                real = min(length - start, values.shape[1])
                if real > 0:
                    writer.write(window, name, start, values[row, :real])

        with profile.batch(number, ids) as captured:
            runner.run(ids, write, captured)
        done += sum(batch.lengths)
        padding += ids.numel() - sum(batch.lengths)
        writer.batch_done(done, last=number == len(batches) - 1)
        warned = warned or gpu.warn_above(warning_threshold, loaded.device)
        now = time.perf_counter()
        if now - said >= SECONDS_BETWEEN_LINES or number == len(batches) - 1:
            said, speed, total = now, (done - first) / (now - begun), len(shard_tokens.input_ids)
            log.info("batch %d of %d: %d of %d tokens, %.0f tokens/s", number + 1, len(batches), done, total, speed)
    log.info("padding: %.1f%% of the tokens forwarded", 100 * padding / max(1, padding + done - first))


def _check_revision(recorded: ModelRecord, tokens_path: Path) -> None:
    """The tokens are of the commit that the model is of: a hub's branch may move between two jobs."""
    corpus = tokens.attributes(tokens_path)
    name, found, expected = corpus["tokenizer"], corpus["tokenizer_revision"], recorded.attributes["revision"]
    if name == recorded.attributes["source"] and found != expected:
        raise StoreError(
            f"tokens.h5 is of revision {found} of {name}, and model.h5 of {expected}; "
            "set model.revision, or run again with --forcerun tokenize_corpus load_model"
        )


def _check_streaming(recorded: ModelRecord, lengths: np.ndarray, chunk_size: int) -> None:
    longest = int(lengths.max(initial=0))
    if longest > chunk_size and not recorded.streams:
        raise ModelError(
            f"{recorded.attributes['model_class']} gives other rows in chunks than in one pass, and a document has "
            f"{longest} tokens; set memory.streaming_chunk_size={longest} or corpus.context_length={chunk_size}"
        )


def _still_to_write(spec: ShardSpec, estimated: Estimate, output: Path) -> int:
    """Bytes that the shard will take beyond what an unfinished file of it already has."""
    partial = partial_of(output)
    there = partial.stat().st_blocks * 512 if partial.exists() else 0
    return max(0, spec.rows * estimated.row_bytes[spec.precision] - there)


def _identity(config_path: Path, recorded: ModelRecord, tokens_path: Path) -> str:
    """A hash of all that decides the rows of a run: config, model, tokens, versions of what computes.

    The plan is not in it: how a shard is cut into batches differs by rounding alone, and each file records its own.
    """
    corpus = tokens.attributes(tokens_path)
    parts = {
        "config": config.digest(config_path),
        "model": [recorded.fingerprint, recorded.precision, recorded.attributes["attention"]],
        "tokens": [corpus["corpus_hash"], corpus["tokens_hash"]],
        "versions": [provenance.attributes("")["versions"].get(p) for p in ("torch", "transformers")],
        "format": layout.FORMAT_VERSION,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _attributes(
    config_path: Path, recorded: ModelRecord, tokens_path: Path, plan: Plan, identity: str
) -> dict[str, Any]:
    """Where the rows come from. `config` holds, by stage, all keys that had a say in them."""
    corpus = tokens.attributes(tokens_path)
    names = ("tokenizer", "tokenizer_revision", "corpus", "corpus_hash", "documents_empty", "last_document_cut_from")
    return provenance.attributes(
        "activations",
        run_identity=identity,
        config={
            "model": json.loads(recorded.attributes["config"]),
            "tokens": json.loads(corpus["config"]),
            "extract": config.plain(config.thaw(config_path)),
        },
        batch_tokens=plan.batch_tokens,
        chunk_size=plan.chunk_size,
        execution="layerwise" if recorded.layerwise else "resident",
        context_length=corpus["context_length"],
        device=recorded.attributes["device"],
        **model_record.provenance_of(recorded),
        **{name: corpus[name] for name in names},
    )
