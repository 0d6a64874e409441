"""`theloom push`: hidden states to a remote store."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from theloom.terminal import examples, format_bytes


def add_push(commands: Any) -> None:
    """Add the subcommand.

    Args:
        commands: the subparsers of `theloom`.
    """
    push = commands.add_parser(
        "push",
        help="upload hidden states, with hashes and a data card, to S3 or another store",
        description="Uploads activations.h5 with its shards, or a run's folder, with a data card "
        "and the hashes of all blocks. theloom.open(URL) then reads rows by ranges, and checks "
        "them. A push that was killed is given again, and uploads what is missing. Any URL of "
        "fsspec will do; credentials are those that the store's own tools find.",
        **examples(
            "theloom push results/smollm2-135m/activations.h5 s3://bucket/smollm2-135m",
            "theloom push results/smollm2-135m hf://user/name --licence 'model: Apache-2.0'",
        ),
    )
    push.add_argument(
        "file", type=Path, metavar="FILE", help="activations.h5, a shard, or a run's folder"
    )
    push.add_argument("url", metavar="URL", help="the folder to be: s3://, gs://, az://, hf://, …")
    push.add_argument(
        "--licence",
        action="append",
        default=[],
        metavar="LINE",
        help="a line on licences for the data card; may be given several times",
    )
    push.add_argument("--json", action="store_true", help="print one JSON object")
    push.set_defaults(run=_push)


def _push(arguments: argparse.Namespace) -> None:
    from theloom.dataset import activations
    from theloom.remote.push import gather, push

    files = gather(arguments.file)
    activations.open_activations(files.paths[files.main])  # all that it refers to is checked
    seen = 0

    def tell(name: str, uploaded: int) -> None:
        nonlocal seen
        seen += 1
        if sys.stderr.isatty() and not arguments.json:
            what = f"uploaded {format_bytes(uploaded)}" if uploaded else "was there"
            print(f"  {seen}/{len(files.paths)} {name}: {what}", file=sys.stderr)

    done = push(arguments.file, arguments.url, arguments.licence, done=tell)
    if arguments.json:
        print(json.dumps(asdict(done), indent=2))
        return
    print(
        f"{done.url}: {done.files} files, {format_bytes(done.bytes)}; uploaded "
        f"{done.uploaded_files} files, {format_bytes(done.uploaded_bytes)}"
    )
    print(f"manifest: SHA-256 {done.manifest_sha256}")
    print(f'read it: theloom.open("{done.url}")')
