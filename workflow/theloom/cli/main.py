"""The command `theloom`. Each subcommand prints tables, or with --json one JSON object.

What a subcommand needs is imported when it runs, so that `theloom --help` is quick.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import theloom
from theloom.cli.estimate import add_estimate
from theloom.cli.export import add_export
from theloom.cli.files import add_store
from theloom.cli.hooks import add_hooks
from theloom.cli.project import add_init
from theloom.cli.push import add_push
from theloom.cli.run import add_report, add_run
from theloom.errors import TheLoomError
from theloom.pipeline.job import of_system
from theloom.terminal import GIB, Help, capability, examples, lines, red, table

if TYPE_CHECKING:
    from theloom.devices.gpu import GPUInfo


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments after the program's name; None: those of the process.

    Returns:
        The exit code: 0, or 1 for a TheLoomError, which is printed as one line on stderr.

    Raises:
        SystemExit: help was requested, or the arguments are not understood (code 2).
    """
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what could come next
        import argcomplete

        argcomplete.autocomplete(parser)
    arguments = _parsed(parser, sys.argv[1:] if argv is None else argv)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of transformers are for terminals
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except TheLoomError as error:
        print(f"{red('error:', sys.stderr)} {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a disk that is full or fails, a file that may not be read
        print(f"{red('error:', sys.stderr)} {of_system(error, Path.cwd())}", file=sys.stderr)
        return 1
    return 0


def _parsed(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; of `theloom run`, whose words may stand among its options, `extra` is what
    follows `--`.
    """
    end = list(argv).index("--") if argv[:1] == ["run"] and "--" in argv else len(argv)
    arguments, left = parser.parse_known_args(argv[:end])
    unknown = [word for word in left if word.startswith("-") or not hasattr(arguments, "words")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if hasattr(arguments, "words"):
        arguments.words += left
        arguments.extra = list(argv[end + 1 :])
    return arguments


_EPILOG = """\
examples:
  theloom init my-project      a folder with the pipeline, such as a clone is
  theloom run                  the default experiment; theloom run 7b: another
  theloom inspect results/smollm2-135m/activations.h5
  theloom estimate 7b          memory that a profile needs
  theloom COMMAND --help       a command's options, with examples
  (in a clone it is .venv/bin/theloom unless the environment is activated)

exit codes:
  0  done
  1  a user error, or damaged files: one line that starts with error: and
     states what to do
  2  invalid arguments

completion, in bash or zsh:
  eval "$(register-python-argcomplete theloom)"
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="theloom",
        description="Hidden states of transformer models, within the memory you have.",
        epilog=_EPILOG,
        formatter_class=Help,
    )
    parser.add_argument("--version", action="version", version=f"theloom {theloom.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    gpus = commands.add_parser(
        "gpus",
        help="this machine's GPUs and their processes, GPUs to plan for, and cloud offers",
        description="This machine's GPUs (without any, its CPU) with their memory, the precision "
        "that precision_mode=auto resolves to, and their processes; GPUs to plan for; and cloud "
        "offers. GB are 10^9 bytes, GiB 2^30.",
        **examples("theloom gpus", "theloom gpus --all", "theloom gpus --json"),
    )
    gpus.add_argument(
        "--all", action="store_true", help="list every GPU to plan for, not just the common ones"
    )
    gpus.add_argument("--json", action="store_true", help="print one JSON object")
    gpus.set_defaults(run=_gpus)
    add_run(commands)
    add_report(commands)
    add_estimate(commands)
    add_hooks(commands)
    add_store(commands)
    add_export(commands)
    add_push(commands)
    add_init(commands)
    return parser


def _gpus(arguments: argparse.Namespace) -> None:
    from theloom.devices import gpu_specs
    from theloom.devices.gpu import GPUManager, precision_of

    infos = GPUManager().get_gpu_info()
    machine = [
        (info, precision_of(info)) for info in (infos if isinstance(infos, list) else [infos])
    ]
    if arguments.json:
        report = {
            "machine": [
                asdict(info) | {"usage_percent": info.usage_percent, "auto": auto}
                for info, auto in machine
            ],
            "gpus": [asdict(gpu) for gpu in gpu_specs.gpus()],
            "cloud": {
                "as_of": gpu_specs.CLOUD_AS_OF,
                "offers": [
                    asdict(offer) | {"memory_gb": offer.memory_gb, "best_for": offer.best_for}
                    for offer in gpu_specs.CLOUD
                ],
            },
        }
        print(json.dumps(report, indent=2))
        return
    print("This machine (memory in GB, and in GiB)\n")
    print(_machine_table(machine))
    print(_remarks([info for info, _ in machine]))
    print("GPUs to plan for (usable: the least that programs can use of the memory)\n")
    print(_hardware_table(arguments.all))
    print(
        f"\nCloud offers as of {gpu_specs.CLOUD_AS_OF} (for: the largest model in 16 bits, about)\n"
    )
    print(_cloud_table())
    for offer in gpu_specs.CLOUD:
        if offer.remark:
            print(f"  {offer.provider}, {offer.offer}: {offer.remark}")


def _machine_table(machine: list[tuple["GPUInfo", str]]) -> str:
    rows = []
    for info, auto in machine:
        memory = (info.total_memory_gb, info.used_memory_gb, info.free_memory_gb)
        sizes = [f"{gb:.1f} ({gb * 1e9 / GIB:.1f})" for gb in memory]
        busy = "" if info.busy_percent is None else f"{info.busy_percent}%"
        known = capability(info.compute_capability)
        rows.append([info.index, info.name, known, *sizes, busy, auto.upper()])
    return table(
        rows,
        ["", "device", "capability", "total", "used", "free", "busy", "auto"],
        numbers=range(2, 7),
        fold=1,
    )


def _remarks(infos: list["GPUInfo"]) -> str:
    """Lines below the table: the processes on each GPU, and what could not be determined."""
    remarks = []
    for info in infos:
        for process in info.processes:
            used = "?" if process.used is None else f"{process.used / 1e9:.1f}"
            kind = ", vLLM" if process.is_vllm else ""
            remarks.append(f"  {info.label}: {process.name} (pid {process.pid}{kind}) {used} GB")
        if info.note:
            remarks.append(f"  {info.label}: {info.note}")
    return "\n".join(["", *map(lines, remarks), ""]) if remarks else ""


def _hardware_table(every: bool) -> str:
    """All known GPUs, or the common ones: those whose peak speed is known."""
    from theloom.devices import gpu_specs

    known = gpu_specs.gpus()
    shown = [gpu for gpu in known if every or gpu.name in gpu_specs.PLANNED]
    rows = [
        [
            gpu.name,
            gpu.nominal_gb,
            f"{gpu.usable_bytes / 1e9:.1f}",
            f"{gpu.usable_bytes / GIB:.1f}",
            capability(gpu.compute_capability),
            "yes" if gpu.bf16 else "no",
            "yes" if gpu.fp16 else "storage only",
        ]
        for gpu in shown
    ]
    more = len(known) - len(shown)
    printed = table(
        rows, ["GPU", "GB", "usable GB", "GiB", "capability", "BF16", "FP16"], range(1, 5)
    )
    return printed + (f"\n… and {more} others (--all)" if more else "")


def _cloud_table() -> str:
    from theloom.devices import gpu_specs

    rows = [
        [
            offer.provider,
            offer.offer,
            f"{offer.number} × {offer.gpu}",
            offer.memory_gb,
            offer.best_for,
        ]
        for offer in gpu_specs.CLOUD
    ]
    return table(rows, ["provider", "offer", "GPUs", "GB", "for"], range(3, 5))


if __name__ == "__main__":
    sys.exit(main())
