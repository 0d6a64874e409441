"""Python runs this before anything else where this folder is on its path. Snakemake, and a job of
the pipeline, are handed to a process of the tests that has imported their libraries already.

It keeps their standard streams, folder, environment and limits, passes signals on, and ends as they
end. Without that process, or in an environment that the libraries would read otherwise, all starts
as ever.
"""

# modules in C: those in Python round them take longer to import than all that is done here
import _signal
import _socket
import marshal
import os
import resource
import sys


def _hand_over(arguments: list[str]) -> None:
    limits = {n: number for n, number in vars(resource).items() if n.startswith("RLIMIT_")}
    job = {
        "arguments": arguments,
        "folder": os.getcwd(),  # noqa: PTH109  pathlib is not imported yet
        "environment": dict(os.environ),
        "limits": [(number, resource.getrlimit(number)) for number in limits.values()],
    }
    data = marshal.dumps(job)
    streams = b"".join(number.to_bytes(4, sys.byteorder) for number in (0, 1, 2))
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        connection.connect(os.environ["PRELOADED"])
        rights = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, streams)
        connection.sendmsg([len(data).to_bytes(8, "big")], [rights])
        connection.sendall(data)
    except OSError:
        return
    answers = open(connection.fileno(), "rb", closefd=False)  # noqa: SIM115
    process = int(answers.readline())
    if not process:
        return
    for number in (_signal.SIGTERM, _signal.SIGINT, _signal.SIGHUP):
        _signal.signal(number, lambda number, _: os.kill(process, number))
    status = int(answers.readline())
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != _signal.SIGKILL:
            _signal.signal(number, _signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


def _is_job(arguments: list[str]) -> bool:
    """A script that Snakemake wrote for a job."""
    return len(arguments) == 1 and "/.snakemake/scripts/" in arguments[0]


if "PRELOADED" in os.environ:
    arguments = sys.orig_argv[1:]
    if arguments[:2] == ["-m", "snakemake"] or _is_job(arguments):
        _hand_over(arguments)
