"""What a job works with: the files before it, read once, and what follows from them, resolved once.

A fallback of the precision warns where it is resolved, so a job that resolves it once warns once.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from theloom.config.auto import store_precision
from theloom.config.frozen import frozen_digest, load_frozen, to_plain
from theloom.config.schema import Config
from theloom.corpus.batching import Lengths
from theloom.corpus.media.chat_inputs import ChatInputs
from theloom.corpus.media.inputs import Inputs, inputs_of
from theloom.corpus.targets.sources import Sources
from theloom.corpus.tokens_file import reading
from theloom.devices import accelerator
from theloom.engine import model_record
from theloom.engine.model_record import ModelRecord
from theloom.errors import StoreError
from theloom.hooks.points import HookPoint, check_integers
from theloom.model import weight_format
from theloom.model.checks import may_stream
from theloom.model.loading import Target, resolve_precision
from theloom.model.weight_format import WeightFormat
from theloom.planning.estimates import estimate_file
from theloom.planning.estimates.estimate_file import Estimate
from theloom.planning.plan import Plan
from theloom.precision import handed
from theloom.store import file_format, provenance
from theloom.store.partial import partial_of, read_partial
from theloom.store.shard_file import ShardSpec, ShardTokens

if TYPE_CHECKING:
    import torch


# attributes of some runs: of those that store other rows than one for each token, of decoders, and
# of towers
OF_ROWS = (
    *("rows_keep", "rows_pool", "rows_by", "documents_without_rows", "decoder_start"),
    *("processor", "processor_hash", "images"),
)


@dataclass(frozen=True)
class RunContext:
    """A run as its extraction jobs see it.

    Attributes:
        config: The frozen config of the extract stage.
        estimate: What `estimate.h5` holds.
        record: What `model.h5` holds.
        corpus: The attributes of `tokens.h5`.
        longest_window: Tokens of the longest window of the whole corpus.
        target: The device, and the precision resolved for it.
        points: The hook points to extract, in the order of the model.
        store: The precision of the rows on disk.
        fingerprint: A hash of all that determines the rows of the run.
    """

    config: Config
    estimate: Estimate
    record: ModelRecord
    corpus: dict[str, Any]
    longest_window: int
    target: Target
    points: list[HookPoint]
    store: str
    fingerprint: str

    @property
    def handed(self) -> str:
        """The precision of rows that the writer is handed."""
        return handed(self.store, self.record.precision)

    @property
    def device(self) -> "torch.device":
        """The device that the job computes on."""
        return self.target.device

    @property
    def threshold(self) -> float:
        """The share of the device's memory above which the job warns."""
        return self.estimate.threshold

    @property
    def weight_format(self) -> WeightFormat:
        """How the weights are held."""
        return weight_format.weight_format_of(
            self.config, self.record.precision, self.record.quantization
        )


@dataclass(frozen=True)
class ShardJob:
    """One shard of a run: its tokens, its output, and how often earlier jobs ran out of memory."""

    run: RunContext
    number: int
    tokens: ShardTokens
    output: Path
    oom_level: int = 0

    @property
    def fingerprint(self) -> str:
        """A partial file with another one is not resumed."""
        return f"{self.run.fingerprint}-{self.number}"

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each window of the shard, (windows,)."""
        return np.diff(self.tokens.window_offset)

    @cached_property
    def sources(self) -> Sources | Inputs | ChatInputs:
        """What the model is given beside or instead of token ids: the encoder's tokens of each
        window where the rows are a decoder's; images or audio; the images of conversations.
        """
        numbers, columns = self.tokens.window_document, self.tokens.columns
        document = numbers - (numbers[0] if len(numbers) else 0)
        read = json.loads(self.run.corpus["config"])
        given = self.run.corpus.get("processor_hash")
        offsets = self.tokens.window_offset

        def ids_of(window: int) -> np.ndarray:
            return self.tokens.input_ids[offsets[window] : offsets[window + 1]]

        inputs = inputs_of(columns, document, ids_of, self.run.config.model, read, given)
        return Sources(columns, document) if inputs is None else inputs

    @cached_property
    def planned_lengths(self) -> np.ndarray:
        """Tokens by which passes are planned, (windows,): of the source where it is longer."""
        sources = self.sources.lengths
        return self.lengths if sources is None else np.maximum(self.lengths, sources)

    @cached_property
    def windows(self) -> Lengths:
        """The lengths of the windows, as a plan takes them."""
        return Lengths.of([self.planned_lengths])

    @property
    def streams(self) -> bool:
        """Whether the shard's documents may go in chunks; otherwise each goes in one pass."""
        return may_stream(self.run.record, self.windows.longest)

    @property
    def profiled(self) -> bool:
        """Whether the memory of the shard's largest batch is recorded."""
        return self.run.config.memory.profile_shard == self.number

    def spec(self, plan: Plan, batches: int) -> ShardSpec:
        """What the shard's file will hold.

        Args:
            plan: The plan by which it is extracted, which its attributes record.
            batches: The number of units that are committed.

        Returns:
            The points, types, sizes and attributes of the file.
        """
        run = self.run
        return ShardSpec(
            tokens=self.tokens,
            points=run.points,
            keys=run.longest_window,
            precision=run.store,
            batches=batches,
            fingerprint=self.fingerprint,
            attributes=_attributes(run, plan)
            | {
                "kind": "shard",
                "shard": self.number,
                "first_row": self.tokens.first_row,
                "precision": run.store,
            },
            compression=run.config.store.compression.name,
            max_overflow=run.config.store.max_overflow or 0.0,
            allow_nonfinite=bool(run.config.store.allow_nonfinite),
        )

    def started_plan(self) -> Plan | None:
        """The plan with which the shard's partial file was started.

        Returns:
            The plan over the shard's windows; None where there is no partial file of this run.
        """
        partial = read_partial(self.output, self.fingerprint)
        if partial is None:
            return None
        plan = Plan(
            int(partial["batch_tokens"]),
            int(partial["chunk_size"]),
            self.windows.longest,
            int(partial.get("streamed_windows", 1)),
            partial.get("kv_cache") == "offloaded",
        )
        return plan.over(self.windows)

    def bytes_to_write(self, spec: ShardSpec) -> int:
        """Bytes that the shard will take beyond what a partial file of it already has.

        Args:
            spec: What the shard's file will hold.

        Returns:
            Bytes, 0 or more.
        """
        partial = partial_of(self.output)
        there = partial.stat().st_blocks * 512 if partial.exists() else 0
        return max(0, spec.nbytes - there)


def read_job(
    config_path: Path,
    estimate_path: Path,
    model_path: Path,
    tokens_path: Path,
    shard: int,
    output: Path,
    oom_level: int = 0,
) -> ShardJob:
    """Read all files of an extraction job, each once.

    Args:
        config_path: The frozen config of the extract stage.
        estimate_path: Path of `estimate.h5`.
        model_path: Path of `model.h5`.
        tokens_path: Path of `tokens.h5`.
        shard: Number of the shard, from 0.
        output: Path of the finished shard.
        oom_level: How many times batch and chunk are halved from the start.

    Returns:
        The shard, and the run that it is of.

    Raises:
        StoreError: A file is missing or damaged, or the tokens are of another revision.
        HookError: The model lacks a requested hook point.
        ConfigError: The device is not available.
    """
    config, record = load_frozen(config_path), model_record.read(model_path)
    corpus = reading.read_job(tokens_path, shard)
    _check_revision(record, corpus.attributes)
    _check_answers(record, corpus.answered_by)
    estimated = estimate_file.read(estimate_path)
    store, points = (
        store_precision(config, record.precision),
        record.catalog.select(config.memory.activation_cache_filter),
    )
    check_integers(points, record.catalog, store)
    run = RunContext(
        config=config,
        estimate=replace(estimated, batch_tokens=1)
        if record.alone or any(p.of_document for p in points)  # padding changes a state
        else estimated,
        record=record,
        corpus=corpus.attributes,
        longest_window=corpus.longest_window,
        target=resolve_precision(config),
        points=points,
        store=store,
        fingerprint=_fingerprint(config_path, record, corpus.attributes),
    )
    return ShardJob(run, shard, corpus.shard, output, oom_level)


def _check_revision(record: ModelRecord, corpus: dict[str, Any]) -> None:
    """The tokens are of the model's commit: a hub's branch may move between two jobs."""
    name, revision = corpus["tokenizer"], corpus["tokenizer_revision"]
    expected = record.attributes["revision"]
    if name == record.attributes["source"] and revision != expected:
        raise StoreError(
            f"tokens.h5 is of revision {revision} of {name}, and model.h5 of {expected}; "
            "set model.revision, or run again with --forcerun tokenize_corpus load_model"
        )


def _check_answers(record: ModelRecord, fingerprint: str | None) -> None:
    """The answers are the model's own: its files may change between two jobs."""
    if fingerprint not in (None, record.fingerprint):
        raise StoreError(
            "answers.h5 has answers of another model than model.h5: its files have changed; run "
            "again with --forcerun sample_answers load_model"
        )


def _fingerprint(config_path: Path, record: ModelRecord, corpus: dict[str, Any]) -> str:
    """A hash of all that determines the rows: config, model, tokens, versions of what computes.

    The plan is not in it: how a shard is cut into batches changes rounding alone, and each file
    records its own.
    """
    versions = provenance.attributes("")["package_versions"]
    parts = {
        "config": frozen_digest(config_path),
        "model": [record.fingerprint, record.precision, record.attributes["attention"]],
        "tokens": [
            corpus.get(name) for name in ("corpus_hash", "tokens_hash", "tables_hash", "rows_hash")
        ],
        "versions": [versions.get(p) for p in ("torch", "transformers")],
        "format": file_format.FORMAT_VERSION,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _attributes(run: RunContext, plan: Plan) -> dict[str, Any]:
    """Provenance of the rows. `config` holds, by stage, all keys on which they depend."""
    names = (
        "tokenizer",
        "tokenizer_revision",
        "corpus",
        "corpus_hash",
        "characters",
        "empty_documents",
        "truncated_from",
    )
    return provenance.attributes(
        "activations",
        run_fingerprint=run.fingerprint,
        config={
            "model": json.loads(run.record.attributes["config"]),
            "tokens": json.loads(run.corpus["config"]),
            "extract": to_plain(run.config),
        },
        batch_tokens=plan.batch_tokens,
        chunk_size=plan.chunk_size,
        execution="layerwise" if run.record.layerwise else "resident",
        streamed_windows=plan.streamed_windows,
        kv_cache="offloaded" if plan.offloaded else "device",
        context_length=run.corpus["context_length"],
        device=run.record.attributes["device"],
        arithmetic=accelerator.arithmetic(),
        **model_record.provenance_of(run.record),
        **{name: run.corpus[name] for name in names},
        **{name: run.corpus[name] for name in OF_ROWS if name in run.corpus},
    )
