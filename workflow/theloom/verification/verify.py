"""Verify a finished run: recompute documents, check every window's hash, count nonfinite values.

`in_parts` has the same for a run so large that several jobs share the work.
"""

import logging
from pathlib import Path

import h5py
import numpy as np

from theloom.config.schema import Config
from theloom.dataset import inspect
from theloom.dataset.activations import Activations, open_activations
from theloom.dataset.inspect import check_hashes
from theloom.errors import VerificationError
from theloom.store import file_format, provenance
from theloom.store.hdf5.output import Output, written
from theloom.verification import encoding, fp32
from theloom.verification.comparison import Recomputation
from theloom.verification.recompute import compare_to_fp32, recompute

log = logging.getLogger(__name__)


def verify_run(
    config: Config, activations: Path, model_path: Path, output: Path, threads: int = 1
) -> None:
    """Run the verify stage in one job.

    Args:
        config: the run's config.
        activations: path of `activations.h5`.
        model_path: path of `model.h5`.
        output: path of `verification.h5`, which is written in any case.
        threads: that read and hash rows.

    Raises:
        VerificationError: a hash, a checksum or a recomputed value does not match.
    """
    acts = open_activations(activations)
    damaged = inspect.damaged_parts(acts)
    wrong, nonfinite = check_hashes(acts, threads=threads)
    recomputed = recompute(config, acts, model_path)
    with written(output) as file:
        write(file, acts, recomputed, wrong, nonfinite)
    if (compared := compare_to_fp32(config, acts, recomputed)) is not None:
        with h5py.File(output, "a") as file:
            fp32.write(compared, file)
    report_damage(acts, damaged, wrong)
    report_recomputed(acts, recomputed)


def write(
    file: Output,
    acts: Activations,
    recomputed: Recomputation,
    wrong: list[int],
    nonfinite: np.ndarray,
) -> None:
    """Write all of `verification.h5` but its group `fp32`.

    Args:
        file: the open file.
        acts: the run's activations.
        recomputed: the errors of recomputed windows.
        wrong: numbers of the windows whose hashes differ.
        nonfinite: values that are NaN or infinite, (hook points,).
    """
    file_format.set_attributes(
        file,
        provenance.attributes(
            "verification",
            run_fingerprint=acts.attributes["run_fingerprint"],
            tolerance=recomputed.tolerance,
            windows_hashed=acts.window_count,
            windows_wrong=wrong,
            rows=len(acts),
        ),
    )
    file["hooks"] = file_format.fixed_strings([p.name for p in recomputed.points])
    file["nonfinite"] = nonfinite
    windows = [r.window for r in recomputed.results]
    file["recomputed/window"] = windows
    file["recomputed/document"] = file_format.fixed_strings(
        [acts.document_id_of(acts.document_of_window(w)) for w in windows]
    )
    file["recomputed/tokens"] = [int(np.diff(acts.window_tokens[w : w + 2])[0]) for w in windows]
    file["recomputed/max_abs_error"] = [r.max_abs_error for r in recomputed.results]
    file["recomputed/max_abs"] = [r.max_abs for r in recomputed.results]
    file["recomputed/tolerance"] = recomputed.tolerances
    if recomputed.costs.size:
        for number, name in enumerate(encoding.Cost._fields):
            file[f"encoding/{name}"] = recomputed.costs[..., number]


def report_damage(acts: Activations, damaged: list[str], wrong: list[int]) -> None:
    """Raise if a file has changed since it was written.

    Args:
        acts: the run's activations.
        damaged: one message per damaged part (`dataset.inspect.damaged_parts`).
        wrong: numbers of the windows whose hashes differ (`dataset.inspect.check_hashes`).

    Raises:
        VerificationError: there is any damage.
    """
    if wrong:
        name = acts.document_id_of(acts.document_of_window(wrong[0]))
        damaged = [
            f"rows of {len(wrong)} windows are not those that were written (first: {name})",
            *damaged,
        ]
    if damaged:
        raise VerificationError(
            f"{acts.path}: {'; '.join(damaged)}; the disk or a program has changed them; "
            "delete the shards and run again"
        )


def report_recomputed(acts: Activations, recomputed: Recomputation) -> None:
    """Log the largest error of each hook point.

    Args:
        acts: the run's activations.
        recomputed: what `recompute` returned.

    Raises:
        VerificationError: rows differ from the model's by more than the tolerance, or nothing
            could be recomputed.
    """
    if not recomputed.results:
        raise VerificationError(
            "no document could be recomputed in one pass; lower corpus.context_length"
        )
    worst, tolerances = recomputed.worst, recomputed.tolerances
    for point, share in zip(recomputed.points, worst, strict=True):
        log.info(
            "%s: largest error %.2g of the largest value, over %d documents",
            point.name,
            share,
            len(recomputed.results),
        )
        if (rounding := recomputed.rounding.get(point.name)) is not None:
            log.warning(
                "%s: more than %.2g; the model itself is %.2g from its values in %s: "
                "they are ill-conditioned",
                point.name,
                recomputed.tolerance,
                rounding,
                recomputed.finer.upper(),
            )
    if (costs := recomputed.costs).size:
        encoding.report(acts.stored_as, [p.name for p in recomputed.points], costs)
    if not (worst <= tolerances).all():
        number = int((worst / tolerances).argmax())
        raise VerificationError(
            f"{acts.path}: {recomputed.points[number].name} differs from the model by "
            f"{worst[number]:.3g} of its largest value, more than {tolerances[number]:.3g} "
            "(verify.tolerance); do not use these rows, and report the model"
        )
