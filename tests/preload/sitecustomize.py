"""Python runs this before anything else where this folder is on its path. Snakemake, and a job of
the pipeline, are handed to a process of the tests that has imported their libraries already.

It keeps their standard streams, folder, environment and limits, passes signals on, and ends as they
end. Without that process, or in an environment that the libraries would read otherwise, all starts
as ever.
"""

import json
import os
import re
import resource
import signal
import socket
import sys

_JOBS = re.compile(r"/\.snakemake/scripts/\w+\.\w+\.py")
# What libraries read when they are imported.
SENSITIVE = re.compile(
    # the job sets its threads once more, and CUDA reads its devices when it starts
    r"(?!\w+_NUM_THREADS|CUDA_VISIBLE_DEVICES$)"
    r"(ATEN|CUDA|GOMP|HF|HUGGING|KMP|LD|MALLOC|MKL|OMP|OPENBLAS|PYTORCH|TORCH|TRANSFORMERS|XDG)_|"
    r"(GLIBC_TUNABLES|HOME|PYTHON(HASHSEED|OPTIMIZE|WARNINGS))$"
)
LIMITS = sorted(number for name, number in vars(resource).items() if name.startswith("RLIMIT_"))


def sensitive(environment: dict[str, str]) -> dict[str, str]:
    """The part of an environment that libraries read when they are imported."""
    return {k: v for k, v in environment.items() if SENSITIVE.match(k)}


def _hand_over(arguments: list[str]) -> None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(os.environ["PRELOADED"])
        if json.loads(connection.makefile().readline()) != sensitive(dict(os.environ)):
            return
    except OSError:
        return
    job = {
        "arguments": arguments,
        "folder": os.getcwd(),  # noqa: PTH109  pathlib is not imported yet
        "environment": dict(os.environ),
        "limits": [resource.getrlimit(number) for number in LIMITS],
    }
    text = json.dumps(job).encode()
    socket.send_fds(connection, [len(text).to_bytes(8, "big")], [0, 1, 2])
    connection.sendall(text)
    answers = connection.makefile()
    process = int(answers.readline())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: os.kill(process, number))
    status = int(answers.readline())
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


if "PRELOADED" in os.environ:
    arguments = sys.orig_argv[1:]
    if arguments[:2] == ["-m", "snakemake"] or (len(arguments) == 1 and _JOBS.search(arguments[0])):
        _hand_over(arguments)
