"""Verify a run in several jobs: rows in one group of jobs, documents in another, then a gather.

`check_rows` reads a group of shards and needs no model; `recompute_documents` loads the model for a
share of the documents. `gather` writes the `verification.h5` that one job would write.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from theloom.config.schema import Config
from theloom.dataset import inspect
from theloom.dataset.activations import Activations, open_activations
from theloom.engine import model_record
from theloom.errors import StoreError
from theloom.hooks.points import HookPoint
from theloom.precision import FINER
from theloom.store import file_format, provenance
from theloom.store.hdf5.output import Output, written
from theloom.terminal import format_bytes
from theloom.verification import comparison, fp32
from theloom.verification.choice import windows_of_shards
from theloom.verification.comparison import Recomputation, Recomputed
from theloom.verification.encoding import Cost
from theloom.verification.fp32 import Fidelity
from theloom.verification.recompute import chosen, compare_to_fp32, points_of, recompute
from theloom.verification.verify import report_damage, report_recomputed, write

log = logging.getLogger(__name__)

ROWS, DOCUMENTS = "checked_rows", "recomputed_documents"  # kinds of files


def check_rows(activations: Path, part: int, parts: int, output: Path, threads: int = 1) -> None:
    """Check the files and rows of a group of shards: the stage check_rows.

    Args:
        activations: path of `activations.h5`.
        part: number of the group, from 0.
        parts: how many groups there are.
        output: the file with the counts.
        threads: that read and hash rows.

    Raises:
        VerificationError: a hash or a checksum does not match.
    """
    acts = open_activations(activations)
    ends = windows_of_shards(acts)
    shards = range(*(len(ends) * n // parts for n in (part, part + 1)))
    first, end = (int(ends[n - 1]) if n else 0 for n in (shards.start, shards.stop))
    files = acts.files[shards.start : shards.stop] if acts.is_virtual else []
    damaged = inspect.damaged_parts(acts, files if part else [acts.path, *files])
    wrong, nonfinite = inspect.check_hashes(acts, range(first, end), threads)
    report_damage(acts, damaged, wrong)
    with written(output) as file:
        _begin(file, ROWS, acts, part, parts)
        file.attrs["windows"] = end - first
        file["nonfinite"] = nonfinite


def recompute_documents(
    config: Config, activations: Path, model_path: Path, part: int, parts: int, output: Path
) -> None:
    """Recompute a share of the documents: the stage recompute_documents. `gather` judges the
    errors, since rounding that one part measures may explain another's.

    Args:
        config: the run's config.
        activations: path of `activations.h5`.
        model_path: path of `model.h5`.
        part: number of the share, from 0.
        parts: how many shares there are.
        output: the file with the errors.

    Raises:
        VerificationError: `model.h5` belongs to another model.
    """
    acts = open_activations(activations)
    recorded = model_record.read(model_path)
    windows = chosen(config, acts, recorded)
    documents = list(dict.fromkeys(map(acts.document_of_window, windows)))[part::parts]
    mine = [w for w in windows if acts.document_of_window(w) in documents]
    if mine:
        recomputed = recompute(config, acts, model_path, windows=mine)
        compared = compare_to_fp32(config, acts, recomputed)
    else:  # the run has fewer documents than jobs
        finer, points = FINER[recorded.precision], points_of(recorded, acts)
        recomputed, compared = Recomputation(points, [], 0.0, None, {}, finer), None
    with written(output) as file:
        _begin(file, DOCUMENTS, acts, part, parts)
        _write_recomputed(file, recomputed, {w: n for n, w in enumerate(windows)})
        if compared is not None:
            fp32.write(compared, file)


def gather(
    activations: Path,
    model_path: Path,
    rows: Sequence[Path],
    documents: Sequence[Path],
    output: Path,
) -> None:
    """Write `verification.h5` from the results of all parts: the stage verify of such a run.

    Args:
        activations: path of `activations.h5`.
        model_path: path of `model.h5`.
        rows: the files of `check_rows`.
        documents: the files of `recompute_documents`.
        output: path of `verification.h5`.

    Raises:
        VerificationError: a recomputed value does not match.
        StoreError: a part is missing, or is of other activations.
    """
    acts = open_activations(activations)
    counted = _read(rows, ROWS, acts)
    windows, needed = sum(int(c["windows"]) for c in counted), acts.window_count
    if windows != needed:
        raise StoreError(
            f"{acts.path}: {windows} of its {needed} windows were checked; run again with "
            "--forcerun check_rows"
        )
    points = points_of(model_record.read(model_path), acts)
    found = _read(documents, DOCUMENTS, acts)
    recomputed, compared = _joined(points, found), _joined_fp32(found)
    with written(output) as file:
        write(file, acts, recomputed, [], sum(c["nonfinite"] for c in counted))
        if compared is not None:
            fp32.write(compared, file)
    report_recomputed(acts, recomputed)


def _begin(file: Output, kind: str, acts: Activations, part: int, parts: int) -> None:
    """What every part's file has: which part, and of which activations."""
    run = acts.attributes["run_fingerprint"]
    others = {"run_fingerprint": run, "rows": len(acts), "part": part, "parts": parts}
    file_format.set_attributes(file, provenance.attributes(kind, **others))


def _read(paths: Sequence[Path], kind: str, acts: Activations) -> list[dict[str, Any]]:
    """The attributes and datasets of all parts, by name, in the order of parts. Raises StoreError
    where they are not all parts of one verification.
    """
    found: list[dict[str, Any]] = []
    for path in paths:
        with file_format.open_h5(path, kind) as file:
            values: dict[str, Any] = dict(file.attrs)
            file.visititems(lambda name, item, to=values: to.update(_value(name, item)))
            found.append(values)
    found.sort(key=lambda values: int(values["part"]))
    mine = (acts.attributes["run_fingerprint"], len(acts), len(paths))
    for number, values in enumerate(found):
        of = tuple(values[name] for name in ("run_fingerprint", "rows", "parts"))
        if of != mine or values["part"] != number:
            raise StoreError(
                f"{paths[number].parent}: its files are not the {len(paths)} parts of a "
                f"verification of {acts.path}; remove that folder and run again"
            )
    return found


def _value(name: str, item: Any) -> dict[str, Any]:
    return {name: item[()]} if hasattr(item, "dtype") else {}


def _write_recomputed(file: Output, recomputed: Recomputation, order: dict[int, int]) -> None:
    names, results = [p.name for p in recomputed.points], recomputed.results
    file.attrs["tolerance"], file.attrs["finer"] = recomputed.tolerance, recomputed.finer
    file.attrs["suspect_bytes"] = recomputed.suspect_bytes
    file["rounding"] = [recomputed.rounding.get(name, np.nan) for name in names]
    shape = (len(results), len(names))
    file["recomputed/window"] = np.array([r.window for r in results], "<i8")
    file["recomputed/order"] = np.array([order[r.window] for r in results], "<i8")
    errors, largest = [r.max_abs_error for r in results], [r.max_abs for r in results]
    file["recomputed/max_abs_error"] = np.array(errors, "<f8").reshape(shape)
    file["recomputed/max_abs"] = np.array(largest, "<f8").reshape(shape)
    file["recomputed/costs"] = recomputed.costs


def _joined(points: list[HookPoint], parts: Sequence[dict[str, Any]]) -> Recomputation:
    """The errors of all parts, in the order in which one job has them."""
    with_results = [p for p in parts if len(p["recomputed/window"])] or parts[:1]
    alike = {(float(p["tolerance"]), p["finer"]) for p in with_results}
    if len(alike) > 1:
        raise StoreError(
            "the documents were recomputed in several precisions, on unlike devices; run again "
            "with --forcerun recompute_documents on devices of one kind"
        )
    (tolerance, finer), *_ = alike
    results: list[tuple[int, Recomputed]] = []
    for part in with_results:
        columns = ("order", "window", "max_abs_error", "max_abs", "costs")
        for order, window, errors, largest, costs in zip(
            *(part[f"recomputed/{c}"].tolist() for c in columns), strict=True
        ):
            of_window = Recomputed(window, errors, largest, [Cost(*c) for c in costs])
            results.append((order, of_window))
    results.sort(key=lambda result: result[0])
    suspect = sum(int(p["suspect_bytes"]) for p in parts)
    rounding: dict[str, float] = {}
    if suspect > comparison.MAX_SUSPECT_BYTES:
        most = format_bytes(comparison.MAX_SUSPECT_BYTES)
        log.warning("more than %s of values differ: not compared to %s", most, finer.upper())
    else:
        measured = np.array([p["rounding"] for p in parts])
        for number, point in enumerate(points):
            if (known := measured[:, number][~np.isnan(measured[:, number])]).size:
                rounding[point.name] = float(known.max())
    ordered = [result for _, result in results]
    return Recomputation(points, ordered, tolerance, None, rounding, finer, suspect)


def _joined_fp32(parts: Sequence[dict[str, Any]]) -> Fidelity | None:
    """The similarities of all parts that have some."""
    rows: list[tuple[int, int, list[float], list[float]]] = []
    hooks: list[str] = []
    for part in (p for p in parts if "fp32/window" in p):
        of = part["recomputed/window"].tolist()
        order = dict(zip(of, part["recomputed/order"].tolist(), strict=True))
        hooks = [name.decode() for name in part["fp32/hooks"].tolist()]
        names = ("window", "cosine", "min_cosine")
        for window, *pair in zip(*(part[f"fp32/{n}"].tolist() for n in names), strict=True):
            rows.append((order[window], window, *pair))
    if not rows:
        return None
    _, windows, cosine, min_cosine = (list(column) for column in zip(*sorted(rows), strict=True))
    return Fidelity(hooks, windows, cosine, min_cosine)
