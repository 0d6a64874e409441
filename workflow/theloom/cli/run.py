"""`theloom run` and `theloom report`: the pipeline, with each word handed over exactly as it was
typed.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from theloom.config import locations
from theloom.errors import ConfigError, ProjectError
from theloom.terminal import examples

if TYPE_CHECKING:
    from theloom.pipeline.request import Request

_PROFILES = Path("workflow/profiles")


def add_run(commands: Any) -> None:
    """Add the subcommand to the parser's.

    Args:
        commands: What `add_subparsers` of argparse gave.
    """
    run = commands.add_parser(
        "run",
        help="run the pipeline: a profile, and the keys that you change",
        usage="theloom run [PROFILES] [KEY=VALUE ...] [options] [-- ARGUMENT_OF_SNAKEMAKE ...]",
        description="Runs the pipeline of the current folder, a clone or a project of theloom "
        "init. Each word is taken as the shell hands it over: no other quotes are needed. Numbers, "
        "choices and lists with commas between make a run for each; so does a key of text that is "
        "given several times. The exit code is Snakemake's.",
        **examples(
            "theloom run",
            "theloom run 3b,7b memory.precision_mode=bf16,fp16 --dry-run",
            "theloom run custom model.source=/my/model corpus=text corpus.path='/my texts'",
            "theloom run custom overrides=mine.yaml --profile slurm",
            "theloom run 7b -- figures",
        ),
    )
    _add_words(run)
    run.add_argument(
        "-n", "--dry-run", action="store_true", help="print what would run, and run nothing"
    )
    run.set_defaults(run=_run)


def add_report(commands: Any) -> None:
    """Add the subcommand to the parser's.

    Args:
        commands: What `add_subparsers` of argparse gave.
    """
    report = commands.add_parser(
        "report",
        help="draw the figures of runs, and write a page for each",
        usage="theloom report [PROFILES] [KEY=VALUE ...] [options]",
        description="Finishes the runs, draws their figures, and writes results/RUN/report.html, "
        "and Snakemake's own report as results/RUN/provenance.html. The words are those of "
        "theloom run.",
        **examples(
            "theloom report",
            "theloom report 3b,7b memory.precision_mode=bf16,fp16",
        ),
    )
    _add_words(report)
    report.add_argument(
        "--set",
        metavar="WORDS",
        help="key=value words in one text, as make and Snakemake take them",
    )
    report.set_defaults(run=_report, dry_run=False)


def _add_words(run: argparse.ArgumentParser) -> None:
    run.add_argument(
        "words",
        nargs="*",
        metavar="PROFILES | KEY=VALUE",
        help="profiles with commas between (default: that of config/default.yaml), then keys; "
        "overrides=FILE takes keys from a YAML file",
    )
    run.add_argument(
        "--profile",
        default="local",
        metavar="NAME",
        help="where jobs run: a folder of workflow/profiles, or any other folder of a Snakemake "
        "profile (local)",
    )
    run.add_argument("--cores", metavar="N", help="CPU cores to use at most; default: all")


def command(arguments: argparse.Namespace, extra: Sequence[str]) -> list[str]:
    """The call of Snakemake for a command line.

    Args:
        arguments: What the parser read.
        extra: Snakemake's own arguments.

    Returns:
        The words of the call, Python first.

    Raises:
        ConfigError: A word is wrong.
        ProjectError: The folder is no project, or there is no such profile of Snakemake.
    """
    read = _requested(arguments)
    if forbidden := [word for word in extra if word in ("--config", "-C")]:
        raise ConfigError(
            f"{forbidden[0]}: theloom run passes it itself; write key=value before --"
        )
    if not Path("Snakefile").is_file() or not Path("config/default.yaml").is_file():
        raise ProjectError(
            f"{Path.cwd()}: no pipeline here; go to your clone or project, or make one: "
            "theloom init my-project"
        )
    options = ["--cores", arguments.cores] if arguments.cores else []
    options += ["--dry-run"] if arguments.dry_run else []
    config = ["--config", *read.arguments()] if read.arguments() else []
    call = [sys.executable, "-m", "snakemake", "--profile", _profile(arguments.profile)]
    end = list(extra).index("--") if "--" in extra else len(extra)
    return [*call, *options, *extra[:end], *config, *extra[end:]]


def _requested(arguments: argparse.Namespace) -> "Request":
    """The runs that the words request."""
    # slow to import, as Hydra is not
    from theloom.config import words as one_text
    from theloom.pipeline import request

    words = list(arguments.words)
    named = [words.pop(0)] if words and "=" not in words[0] else []
    profiles = [*named, *(w.removeprefix("profiles=") for w in words if _is(w, "profiles"))]
    if len(profiles) > 1:
        raise ConfigError(f"profiles {' and '.join(profiles)}: write one list, with commas between")
    return request.of_words(
        profiles[0] if profiles else None,
        [word for word in words if not _is(word, "profiles") and not _is(word, "overrides")],
        [Path(word.partition("=")[2]) for word in words if _is(word, "overrides")],
        one_text.from_text(getattr(arguments, "set", None) or ""),
    )


def _is(word: str, key: str) -> bool:
    return word.startswith(f"{key}=")


def _profile(name: str) -> str:
    """The folder of one of Snakemake's profiles."""
    if (_PROFILES / name).is_dir():
        return str(_PROFILES / name)
    if Path(name).is_dir():
        return name
    there = ", ".join(sorted(p.name for p in _PROFILES.glob("*/")))
    raise ProjectError(
        f"--profile {name}: neither a folder of {_PROFILES} ({there}) nor another folder; the "
        f"model's profile goes first: {locations.program('theloom')} run {name}"
    )


def _run(arguments: argparse.Namespace) -> None:
    call = command(arguments, arguments.extra)
    sys.stdout.flush()
    os.execv(call[0], call)  # so that signals and the exit code are Snakemake's


def _report(arguments: argparse.Namespace) -> None:
    from theloom.config.compose import runs

    call = command(arguments, ["figures"])
    if code := subprocess.call(call):
        sys.exit(code)
    requested = _requested(arguments)
    pages = []
    for name in runs(Path("config"), requested.profiles, requested.assignments):
        folder = Path("results", name)
        page = [str(folder / "report.html"), "--report", str(folder / "provenance.html")]
        if code := subprocess.call(command(arguments, [*page, "--quiet"])):
            sys.exit(code)
        pages.append(page[0])
    print("\n".join(["open in a browser:", *(f"  {page}" for page in pages)]))
