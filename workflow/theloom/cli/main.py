"""The command `theloom`. Each subcommand prints tables, or with --json one JSON object.

What a subcommand needs is imported when it runs, so that `theloom --help` is quick.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import theloom
from theloom.cli.estimate import add_estimate
from theloom.cli.files import add_store
from theloom.cli.project import add_init
from theloom.errors import TheLoomError
from theloom.terminal import GIB, Help, capability, examples, lines, red, table

if TYPE_CHECKING:
    from theloom.devices.gpu import GPUInfo


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit code: 1 for an error of the user's, which is one line
    on stderr.
    """
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what could come next
        import argcomplete

        argcomplete.autocomplete(parser)
    arguments = parser.parse_args(argv)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of transformers are for terminals
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except TheLoomError as error:
        print(f"{red('error:', sys.stderr)} {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, head for one, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


_EPILOG = """\
examples:
  theloom init my-project      a folder with the pipeline; in a clone: make run
  theloom inspect results/smollm2-135m/activations.h5
  theloom estimate 7b          the memory that a profile needs
  theloom COMMAND --help       a command's options, with examples
  (in a clone it is .venv/bin/theloom unless the environment is activated)

exit codes:
  0  done
  1  a mistake that you can mend, or files found wrong: one line that begins
     with error: says what to do
  2  a command line that is not understood

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
        help="this machine's GPUs and who uses them, GPUs to plan for, and offers of clouds",
        description="This machine's GPUs (without any, its CPU) with their memory, the precision that "
        "precision_mode=auto gives there, and the processes on them; GPUs to plan for; and what clouds offer. "
        "GB are 10^9 bytes, GiB 2^30.",
        **examples("theloom gpus", "theloom gpus --all", "theloom gpus --json"),
    )
    gpus.add_argument(
        "--all", action="store_true", help="every GPU to plan for, not the usual ones alone"
    )
    gpus.add_argument("--json", action="store_true", help="print one JSON object")
    gpus.set_defaults(run=_gpus)
    add_estimate(commands)
    add_store(commands)
    add_init(commands)
    return parser


def _gpus(arguments: argparse.Namespace) -> None:
    from theloom import precision
    from theloom.devices import gpu_specs
    from theloom.devices.gpu import GPUManager

    found = GPUManager().get_gpu_info()
    machine = [
        (info, precision.follow("auto", info.compute_capability).resolved)
        for info in (found if isinstance(found, list) else [found])
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
    print("GPUs to plan for (memory; usable: what is at least left of it for programs)\n")
    print(_hardware_table(arguments.all))
    print(
        f"\nOffers of clouds, as of {gpu_specs.CLOUD_AS_OF} (for: the largest model in 16 bits, about)\n"
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
        rows.append(
            [info.index, info.name, capability(info.compute_capability), *sizes, auto.upper()]
        )
    return table(
        rows,
        ["", "device", "capability", "total", "used", "free", "auto"],
        numbers=range(2, 6),
        fold=1,
    )


def _remarks(infos: list["GPUInfo"]) -> str:
    """What the table has no column for: the processes on each GPU, and what could not be known."""
    found = []
    for info in infos:
        for process in info.processes:
            used = "?" if process.used is None else f"{process.used / 1e9:.1f}"
            kind = ", vLLM" if process.is_vllm else ""
            found.append(f"  {info.label}: {process.name} (pid {process.pid}{kind}) {used} GB")
        if info.note:
            found.append(f"  {info.label}: {info.note}")
    return "\n".join(["", *map(lines, found), ""]) if found else ""


def _hardware_table(every: bool) -> str:
    """All GPUs that are known, or the usual ones: those whose speed is known too."""
    from theloom.devices import gpu_specs
    from theloom.planning import execution_modes

    known = gpu_specs.gpus()
    shown = [gpu for gpu in known if every or gpu.name in execution_modes.PEAK]
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
