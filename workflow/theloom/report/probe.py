"""Figure of a label: how well a linear probe finds it at each hook point.

The probe is scikit-learn's logistic regression on standardised rows. Documents are split into
folds, so that each row is classified by a probe that saw no row of its document. The control is
the same probe on labels shuffled among the documents: what it reaches is chance.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from theloom.dataset.activations import Activations
from theloom.errors import ConfigError, printable
from theloom.report import style
from theloom.report.states import tick_labels
from theloom.report.style import Drawn, Table

log = logging.getLogger(__name__)

FOLDS = 5
SHUFFLES = 3  # of the labels, for the control
MOST_VALUES = 20  # of a label: with more it is no class


@dataclass(frozen=True)
class Labelled:
    """The rows of a dataset that a probe is trained and tested on.

    Args:
        rows: their numbers, ascending, (rows,).
        label: the place in `values` of the label of each row, (rows,).
        document: the number of the document of each row, (rows,).
        values: the values of the label, as texts.
        left_out: values of too few documents, with the number of these.
    """

    rows: np.ndarray
    label: np.ndarray
    document: np.ndarray
    values: list[str]
    left_out: dict[str, int]

    @property
    def folds(self) -> int:
        """Parts that the documents are split into: each value is in every one of them."""
        pairs = np.unique(np.stack([self.document, self.label]), axis=1)
        return min(FOLDS, int(np.bincount(pairs[1]).min()))

    @property
    def majority(self) -> float:
        """The share of rows that have the most common label."""
        return float(np.bincount(self.label).max() / len(self.label))


@dataclass(frozen=True)
class Accuracy:
    """The share of held-out rows that a probe classifies correctly.

    `low` and `high`: the 95% interval of Wilson for as many trials as there are documents, since
    rows of one document are no independent trials. `control`: with shuffled labels, on average.
    """

    hook: str
    share: float
    low: float
    high: float
    control: float


def labels(acts: Activations, name: str) -> np.ndarray:
    """The label of each document, as texts; masked where it has none.

    Args:
        acts: activations of a run.
        name: a column of the corpus.

    Returns:
        (documents,).

    Raises:
        ConfigError: the run has no such column.
    """
    if name not in acts.columns:
        there = ", ".join(map(printable, acts.columns)) or "none"
        raise ConfigError(
            f"report.label: no column {printable(name)!r} in {acts.path}; its columns: {there} "
            "(corpus.columns adds others)"
        )
    of_documents = acts.columns[name].array()
    none = np.ma.getmaskarray(of_documents).copy()
    values = np.ma.getdata(of_documents)
    if values.dtype.kind == "f":
        none |= np.isnan(values)
    return np.ma.array(values.astype(str), mask=none)


def choose(acts: Activations, name: str, count: int, seed: int) -> Labelled | str:
    """Choose the rows for a probe: all that have a label, or a sample of them.

    Args:
        acts: activations of a run.
        name: a column of the corpus.
        count: rows at most.
        seed: of the sample.

    Returns:
        The rows; or a sentence that says why there can be no probe.

    Raises:
        ConfigError: the run has no such column.
    """
    document = acts.rows["document"]
    label = labels(acts, name)[document]
    rows = np.flatnonzero(~np.ma.getmaskarray(label))
    if len(rows) > count:
        rows = np.sort(np.random.default_rng(seed).choice(rows, count, replace=False))
    values, places = np.unique(np.ma.getdata(label)[rows], return_inverse=True)
    if len(values) > MOST_VALUES:
        return (
            f"report.label: {printable(name)} has {len(values):,} values in {len(rows):,} rows; a "
            f"probe takes a label of 2 to {MOST_VALUES}."
        )
    documents = [len(np.unique(document[rows[places == n]])) for n in range(len(values))]
    # a value of a few documents is no class; with less than two it cannot be held out at all
    enough = min(FOLDS, max([*documents, 0]))
    kept = [n for n, found in enumerate(documents) if found >= max(2, enough)]
    if len(kept) < 2:
        listed = ", ".join(
            f"{printable(str(v))}: {n}" for v, n in zip(values, documents, strict=True)
        )
        return (
            f"report.label: a probe takes two values of {printable(name)} or more, each in at "
            f"least two documents; documents by value: {listed or 'none'}."
        )
    inside = np.isin(places, kept)
    rows, places = rows[inside], np.searchsorted(kept, places[inside])
    left_out = {str(values[n]): found for n, found in enumerate(documents) if n not in kept}
    if left_out:
        log.warning("report.label: %s: values of too few documents: %s", name, left_out)
    return Labelled(rows, places, document[rows], [str(values[n]) for n in kept], left_out)


def measure(acts: Activations, chosen: Labelled, seed: int) -> list[Accuracy]:
    """Train and test a probe at each hook point.

    Args:
        acts: activations of a run.
        chosen: the rows.
        seed: of the split of documents, and of the control.

    Returns:
        An accuracy for each hook point whose rows are finite, in their order.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from scipy.stats import binomtest
        from threadpoolctl import threadpool_limits
    except ImportError:
        raise ConfigError(
            "report.label needs scikit-learn; pip install 'theloom[report]'"
        ) from None
    documents = len(np.unique(chosen.document))
    controls = list(_shuffled(chosen, seed))
    found = []
    for hook in acts.hooks:
        x = acts[hook][chosen.rows].float().flatten(1).numpy()
        if not np.isfinite(x).all():
            log.warning("%s: no probe, since rows are not finite", hook)
            continue
        # products this small are faster on one thread
        with threadpool_limits(1):
            share = _held_out(x, chosen.label, chosen, seed)
            control = [_held_out(x, y, chosen, seed) for y in controls]
        interval = binomtest(round(share * documents), documents).proportion_ci(method="wilson")
        # of a share of documents that is no integer
        low, high = min(share, interval.low), max(share, interval.high)
        found.append(Accuracy(hook, share, low, high, float(np.mean(control))))
    return found


def _shuffled(chosen: Labelled, seed: int) -> Iterator[np.ndarray]:
    """The labels of the rows, given to other documents as a whole."""
    there, of_row = np.unique(chosen.document, return_inverse=True)
    first = np.unique(of_row, return_index=True)[1]
    random = np.random.default_rng(seed)
    for _ in range(SHUFFLES):
        yield chosen.label[first][random.permutation(len(there))][of_row]


def _held_out(x: np.ndarray, y: np.ndarray, chosen: Labelled, seed: int) -> float:
    """The share of rows with the right class, each from a probe that its document was held from."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # Rows are often fewer than their elements, and a weaker penalty fits the training documents
    # alone. With this one logits of standardised rows have, a priori, a variance of 1 at any width.
    penalty = LogisticRegression(C=1 / x.shape[1], max_iter=1000)
    probe = make_pipeline(StandardScaler(), penalty)
    split = StratifiedGroupKFold(chosen.folds, shuffle=True, random_state=seed)
    predicted = cross_val_predict(probe, x, y, groups=chosen.document, cv=split)
    return float((predicted == y).mean())


def draw_probe(accuracies: list[Accuracy], chosen: Labelled, label: str, title: str) -> Drawn:
    """Draw the accuracy of a label's probe by hook point, and its control.

    Args:
        accuracies: by hook point.
        chosen: the rows.
        label: name of the label.
        title: start of the figure's title.

    Returns:
        The figure.
    """
    documents = len(np.unique(chosen.document))
    columns = ("hook", "accuracy", "low_95_percent", "high_95_percent", "shuffled_labels")
    facts = (len(chosen.rows), documents, len(chosen.values), chosen.majority)
    table = Table(
        (*columns, "rows", "documents", "values", "majority_share"),
        [(a.hook, a.share, a.low, a.high, a.control, *facts) for a in accuracies],
    )
    heading = (
        f"{title}: linear probe of {printable(label)} in {len(chosen.rows):,} rows of "
        f"{documents:,} documents"
    )
    drawing, (panel,) = style.new(9, 4.5, heading)
    at = np.arange(len(accuracies))
    share, low, high, control = (
        100 * np.array([getattr(a, name) for a in accuracies])
        for name in ("share", "low", "high", "control")
    )
    panel.fill_between(at, low, high, color=style.COLOURS[0], alpha=0.18, linewidth=0)
    panel.plot(at, share, label="held-out documents, with 95% interval", **style.line(0))
    panel.plot(at, control, label="shuffled labels", **style.line(1))
    most = f"always “{_brief(chosen)}”"
    panel.axhline(100 * chosen.majority, color="black", linewidth=1, linestyle=":", label=most)
    ticks, axis = tick_labels([a.hook for a in accuracies])
    step = max(1, -(-len(at) // 32))
    turned: dict[str, Any] = {} if axis.startswith("layer") else {"rotation": 60, "ha": "right"}
    panel.set_xticks(at[::step], ticks[::step], fontsize=9, **turned)
    panel.set_xlabel(axis)
    panel.set_ylabel("accuracy, %")
    panel.set_ylim(min(40.0, float(low.min()) - 2, float(control.min()) - 2), 101)
    drawing.legend(loc="outside lower center", ncols=3)
    return Drawn(drawing, table)


def _brief(chosen: Labelled) -> str:
    """The most common label, cut where it is long."""
    value = chosen.values[int(np.bincount(chosen.label).argmax())]
    return printable(value if len(value) <= 20 else value[:19] + "…").replace("$", r"\$")
