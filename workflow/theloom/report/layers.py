"""How hidden states of the runs of a sweep differ from those of the first run, by hook point."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from theloom.dataset import activations
from theloom.errors import StoreError
from theloom.pairs.pair import open_pair
from theloom.pairs.similarity import Similarity, similarity
from theloom.report import states, style
from theloom.report.style import Drawn, Table

log = logging.getLogger(__name__)

_ROWS = 2048  # sampled of each hook point


@dataclass(frozen=True)
class Differences:
    """One run beside the first one.

    Args:
        run: name of the run.
        hooks: by hook point, in the order of the model.
    """

    run: str
    hooks: list[Similarity]


def measure(folders: list[Path]) -> list[Differences]:
    """Compare the hidden states of each run with those of the first one, over the same tokens.

    Args:
        folders: folders of finished runs.

    Returns:
        An entry for each run whose rows are of the same tokens, and that has hook points of the
        same width in common with the first run; of others the log has the reason.
    """
    first, *others = [activations.open_activations(f / "activations.h5") for f in folders]
    rows = states.sampled_rows(first, _ROWS, seed=0)
    found = []
    for folder, acts in zip(folders[1:], others, strict=True):
        try:
            pair = open_pair(first, acts, names=["first", "other"])
        except StoreError as error:
            log.warning("%s is not compared by hook point: %s", folder.name, error)
            continue
        common = [h for h in states.layers(first) if h in acts]
        hooks = [h for h in common if first[h].shape == acts[h].shape]
        if not hooks:
            log.warning("%s has no hook point of the first run with its width", folder.name)
            continue
        compared = [similarity(pair, hook, rows, "first", "other") for hook in hooks]
        found.append(Differences(folder.name, compared))
    return found


def draw(differences: list[Differences], reference: str, labels: list[str]) -> Drawn:
    """Draw mean cosine similarity and mean ratio of norms by hook point.

    Args:
        differences: from `measure`.
        reference: name of the first run.
        labels: of each entry.

    Returns:
        The figure; a note where no run can be compared.
    """
    title = f"hidden states beside those of {reference}"
    if not differences:
        return style.note(title, "no other run has rows of the same tokens and width")
    hooks = list(dict.fromkeys(s.hook for d in differences for s in d.hooks))
    drawing, panels = style.new(12, 4.2, title, columns=2)
    for number, (entry, label) in enumerate(zip(differences, labels, strict=True)):
        at = [hooks.index(s.hook) for s in entry.hooks]
        look = style.line(number % len(style.COLOURS))
        panels[0].plot(at, [s.cosine for s in entry.hooks], label=label, **look)
        panels[1].plot(at, [s.norm_ratio for s in entry.hooks], label=label, **look)
    shown = np.unique(np.linspace(0, len(hooks) - 1, min(len(hooks), 8)).round()).astype(int)
    for panel, what in zip(panels, ("mean cosine similarity", "mean ratio of norms"), strict=True):
        panel.set_ylabel(what)
        panel.ticklabel_format(axis="y", useOffset=False, style="plain")
        panel.set_xticks(shown, [hooks[n] for n in shown], fontsize=8, rotation=30, ha="right")
    panels[0].legend(fontsize=8)
    table = Table(
        ("run", "hook_point", "mean_cosine_similarity", "mean_norm_ratio", "rows"),
        [(d.run, s.hook, s.cosine, s.norm_ratio, s.rows) for d in differences for s in d.hooks],
    )
    return Drawn(drawing, table)
