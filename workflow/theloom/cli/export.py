"""`theloom export`: a file of hidden states in the format of another project."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from theloom.errors import printable
from theloom.terminal import examples, positive


def add_export(commands: Any) -> None:
    """Add the subcommand.

    Args:
        commands: the subparsers of `theloom`.
    """
    from theloom.exports.formats import FORMATS

    readers = "; ".join(f"{name}: {found.reader}" for name, found in FORMATS.items())
    export = commands.add_parser(
        "export",
        help="write hidden states in the format of another project",
        description="Writes hidden states to a folder that another project reads, and says what "
        f"its format cannot carry. A stopped export goes on. Formats: {readers}.",
        **examples(
            "theloom export activations.h5 --to saelens sae --context-size 128 --pack",
            "theloom export activations.h5 --to npy arrays --keep 'last & ~special'",
        ),
    )
    export.add_argument("file", type=Path, metavar="FILE", help="activations.h5, or one shard")
    export.add_argument("folder", type=Path, metavar="OUT", help="a folder that does not exist yet")
    export.add_argument("--to", required=True, choices=FORMATS, metavar="FORMAT", help="the format")
    export.add_argument(
        "--hooks",
        metavar="A,B",
        type=lambda text: [name for name in text.split(",") if name],
        help="hook points, in order; by default all of the residual stream",
    )
    export.add_argument("--keep", metavar="EXPRESSION", help="rows to export, as rows.keep has it")
    export.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="default: the stored one")
    export.add_argument(
        "--context-size", type=positive, metavar="N", help="rows of a context, where they have one"
    )
    fits = export.add_mutually_exclusive_group()
    fits.add_argument(
        "--pack",
        dest="fit",
        action="store_const",
        const="pack",
        help="join documents to contexts; one may hold several",
    )
    fits.add_argument(
        "--cut",
        dest="fit",
        action="store_const",
        const="cut",
        help="take whole contexts from each document, and leave out the rest",
    )
    export.add_argument("--json", action="store_true", help="print one JSON object")
    export.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> None:
    from theloom.exports.run import export

    done = export(
        arguments.file,
        arguments.to,
        arguments.folder,
        hooks=arguments.hooks,
        keep=arguments.keep,
        dtype=arguments.dtype,
        context_size=arguments.context_size,
        fit=arguments.fit,
        progress=sys.stderr.isatty() and not arguments.json,
    )
    if arguments.json:
        print(json.dumps({**asdict(done), "folder": str(done.folder)}, indent=2))
        return
    print(f"{done.folder}: {done.rows:,} rows of {len(done.hooks)} hook points ({arguments.to})")
    for sentence in done.left_out:
        print(f"  left out: {printable(sentence)}")
