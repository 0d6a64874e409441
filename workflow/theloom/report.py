"""The report stage: which figures a run has, and how each group of them is drawn into the run's folder.

Figures read what earlier stages left and nothing reads them, so that drawing one anew runs nothing else again.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from theloom import (
    dataset,
    figure,
    report_attention,
    report_memory,
    report_speed,
    report_states,
    report_sweep,
    tokenizer,
)
from theloom.errors import ConfigError
from theloom.schema import Config, ReportConfig

log = logging.getLogger(__name__)


def draw_memory(config: Config, estimate: Path, model: Path, folder: Path) -> None:
    """Memory foretold and found, and the GPUs with room for it."""
    title = _title(config, folder)
    figure.save(report_memory.predicted_against_measured(model, title), folder / "memory")
    figure.save(report_memory.fits_on(estimate, title), folder / "gpus")


def draw_speed(config: Config, shards: Sequence[Path], folder: Path) -> None:
    """Speed, padding, and where the time went, shard by shard."""
    works = [report_speed.work_of(shard) for shard in shards]
    figure.save(report_speed.throughput(works, _title(config, folder)), folder / "throughput")
    figure.save(report_speed.where_time_went(works, _title(config, folder)), folder / "time")


def draw_states(config: Config, activations: Path, folder: Path) -> None:
    """Norms, massive activations, likeness of layers, and the map. Raises ConfigError for a hook that is not there."""
    acts, settings, title = dataset.open(activations), config.report, _title(config, folder)
    states = report_states.measure(acts, settings.sampled_rows, settings.figure_seed)
    log.info("%d rows of %d hook points sampled", len(states.rows), len(states.hooks))
    figure.save(report_states.norms(states, title), folder / "norms")
    figure.save(report_states.massive(states, title), folder / "massive")
    figure.save(report_states.likeness(states, title), folder / "likeness")
    hook = settings.map_hook or report_states.middle(acts)
    if hook not in acts:
        raise ConfigError(f"report.map_hook: {hook!r} was not captured; the run has {', '.join(acts.hooks)}")
    rows = np.sort(np.random.default_rng(settings.figure_seed).permutation(states.rows)[: settings.map_rows])
    tokens = tokenizer.texts(acts, acts.input_ids.numpy(rows))
    figure.save(report_states.token_map(acts, hook, rows, tokens, title), folder / "map")


def draw_attention(config: Config, activations: Path, folder: Path) -> None:
    """Attention patterns of one document. Raises ConfigError for a document that is not there."""
    acts, number = dataset.open(activations), config.report.attention_document
    if number >= len(acts.documents):
        raise ConfigError(f"report.attention_document: no document {number}; the run has {len(acts.documents)}, from 0")
    tokens = tokenizer.texts(acts, acts.document(number).input_ids[:64])
    figure.save(report_attention.patterns(acts, number, tokens, _title(config, folder)), folder / "attention")


def draw_runs(folders: Sequence[Path], folder: Path) -> None:
    """All runs of a call side by side."""
    figure.save(report_sweep.side_by_side(report_sweep.compare(list(folders))), folder / "runs")


def _title(config: Config, folder: Path) -> str:
    settings: ReportConfig = config.report
    return settings.title or folder.parent.name
