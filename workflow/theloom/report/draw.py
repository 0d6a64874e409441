"""The report stage: one function per group of figures, each drawn into the run's folder.

Figures read the outputs of earlier stages and no stage reads figures, so redrawing reruns nothing.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from theloom.config.schema import Config, ReportConfig
from theloom.dataset import token_text
from theloom.dataset.activations import open_activations
from theloom.errors import ConfigError
from theloom.report import answers, attention, layers, memory, probe, runs, speed, style
from theloom.report.states import (
    draw_massive,
    draw_norms,
    draw_similarity,
    measure_states,
    middle_layer,
)
from theloom.report.token_map import draw_token_map

log = logging.getLogger(__name__)


def draw_memory(config: Config, estimate: Path, model: Path, folder: Path) -> None:
    """Draw predicted and measured memory, and the GPUs that the run fits on.

    Args:
        config: the run's config.
        estimate: path of `estimate.h5`.
        model: path of `model.h5`.
        folder: where the figures go.
    """
    title = _title(config, folder)
    style.save(memory.predicted_against_measured(model, title), folder / "memory")
    style.save(memory.fits_on(estimate, title), folder / "gpus")


def draw_speed(config: Config, shards: Sequence[Path], folder: Path) -> None:
    """Draw speed, padding and a breakdown of time, by shard.

    Args:
        config: the run's config.
        shards: paths of the shards.
        folder: where the figures go.
    """
    works = [speed.shard_work(shard) for shard in shards]
    style.save(speed.throughput(works, _title(config, folder)), folder / "throughput")
    style.save(speed.time_breakdown(works, _title(config, folder)), folder / "time")


def draw_answers(config: Config, path: Path, shards: Sequence[Path], folder: Path) -> None:
    """Draw how long answers are and why they end, and the speed of sampling by shard.

    Args:
        config: the run's config.
        path: path of `answers.h5`.
        shards: paths of the sampled answers; none where another engine wrote them.
        folder: where the figures go.
    """
    title = _title(config, folder)
    style.save(answers.lengths(answers.read(path), title), folder / "answers")
    works = [answers.sampling_work(number, shard) for number, shard in enumerate(shards)]
    style.save(answers.sampling(works, title), folder / "sampling")


def draw_states(config: Config, activations: Path, folder: Path) -> None:
    """Draw norms, massive activations, layer similarity, and the token map.

    Args:
        config: the run's config.
        activations: path of `activations.h5`.
        folder: where the figures go.

    Raises:
        ConfigError: `report.map_hook` was not captured, or there is no column `report.label`.
    """
    acts, settings, title = open_activations(activations), config.report, _title(config, folder)
    states = measure_states(acts, settings.sampled_rows, settings.figure_seed)
    log.info("%d rows of %d hook points sampled", len(states.rows), len(states.hooks))
    style.save(draw_norms(states, title), folder / "norms")
    style.save(draw_massive(states, title), folder / "massive")
    style.save(draw_similarity(states, title), folder / "similarity")
    hook = settings.map_hook or middle_layer(acts)
    if hook not in acts:
        raise ConfigError(
            f"report.map_hook: {hook!r} was not captured; the run has {', '.join(acts.hooks)}"
        )
    rows = np.sort(
        np.random.default_rng(settings.figure_seed).permutation(states.rows)[: settings.map_rows]
    )
    tokens = token_text.texts(acts, acts.input_ids.numpy(rows))
    label, document = settings.label, np.searchsorted(acts.document_offset, rows, "right") - 1
    colours = None if label is None else (label, probe.labels(acts, label)[document])
    style.save(draw_token_map(acts, hook, rows, tokens, title, colours), folder / "map")


def draw_probe(config: Config, activations: Path, folder: Path) -> None:
    """Draw the accuracy of a linear probe of `report.label` by hook point.

    Args:
        config: the run's config.
        activations: path of `activations.h5`.
        folder: where the figures go.

    Raises:
        ConfigError: the run has no such column, or scikit-learn is not installed.
    """
    acts, settings, title = open_activations(activations), config.report, _title(config, folder)
    assert settings.label is not None
    chosen = probe.choose(acts, settings.label, settings.sampled_rows, settings.figure_seed)
    if isinstance(chosen, str):
        log.warning("%s", chosen)
        drawn = style.note(f"{title}: linear probe", chosen)
    else:
        accuracies = probe.measure(acts, chosen, settings.figure_seed)
        drawn = probe.draw_probe(accuracies, chosen, settings.label, title)
    style.save(drawn, folder / "probe")


def draw_attention(config: Config, activations: Path, folder: Path) -> None:
    """Draw attention patterns of one document.

    Args:
        config: the run's config.
        activations: path of `activations.h5`.
        folder: where the figures go.

    Raises:
        ConfigError: the run does not have the document.
    """
    acts, number = open_activations(activations), config.report.attention_document
    if number >= acts.document_count:
        raise ConfigError(
            f"report.attention_document: no document {number}; "
            f"the run has {acts.document_count}, from 0"
        )
    tokens = token_text.texts(acts, acts.document(number).input_ids[:64])
    style.save(
        attention.patterns(acts, number, tokens, _title(config, folder)), folder / "attention"
    )


def draw_runs(folders: Sequence[Path], folder: Path) -> None:
    """Draw comparisons of several runs: error, memory and speed, and hidden states by layer.

    Args:
        folders: folders of the runs.
        folder: where the figures go.
    """
    style.save(runs.side_by_side(runs.compare(list(folders))), folder / "runs")
    names = [f.name for f in folders]
    differences = layers.measure(list(folders))
    labels = [runs.own_part(d.run, names) for d in differences]
    style.save(layers.draw(differences, names[0], labels), folder / "layers")


def _title(config: Config, folder: Path) -> str:
    settings: ReportConfig = config.report
    return settings.title or folder.parent.name
