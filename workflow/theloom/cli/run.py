"""`theloom run`: the pipeline, with each word handed over exactly as it was typed."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from theloom.config import locations
from theloom.errors import ConfigError, ProjectError
from theloom.terminal import examples

_PROFILES = Path("workflow/profiles")


def add_run(commands: Any) -> None:
    """Add the subcommand to the parser's."""
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
    run.add_argument(
        "-n", "--dry-run", action="store_true", help="print what would run, and run nothing"
    )
    run.set_defaults(run=_run)


def command(arguments: argparse.Namespace, extra: Sequence[str]) -> list[str]:
    """The call of Snakemake for a command line.

    Args:
        arguments: What the parser read.
        extra: Snakemake's own arguments.

    Raises:
        ConfigError: A word is wrong.
        ProjectError: The folder is no project, or there is no such profile of Snakemake.
    """
    # slow to import, as Hydra is not
    from theloom.pipeline import request

    words = list(arguments.words)
    named = [words.pop(0)] if words and "=" not in words[0] else []
    profiles = [*named, *(w.removeprefix("profiles=") for w in words if _is(w, "profiles"))]
    if len(profiles) > 1:
        raise ConfigError(f"profiles {' and '.join(profiles)}: write one list, with commas between")
    if forbidden := [word for word in extra if word in ("--config", "-C")]:
        raise ConfigError(
            f"{forbidden[0]}: theloom run passes it itself; write key=value before --"
        )
    read = request.of_words(
        profiles[0] if profiles else None,
        [word for word in words if not _is(word, "profiles") and not _is(word, "overrides")],
        [Path(word.partition("=")[2]) for word in words if _is(word, "overrides")],
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
