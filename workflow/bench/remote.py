"""Rows of a pushed file next to plain ranged GETs of the same bytes: `make bench-remote`.

A server on loopback, in a process of its own, answers GETs as S3 does, by sendfile. A round reads
all rows of one hook point in each way, in turn; the server, the client and the hashes share the
machine's cores. Plain is boto3, one GET of the whole range, or four at once in threads; and fsspec.
Prints the median rate of each, and the ratio in the rounds.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import fsspec
import numpy as np
import theloom
import torch
from theloom.hooks.points import residual_points
from theloom.remote.push import push
from theloom.store import file_format, index, provenance
from theloom.store.shard_file import ShardSpec, ShardTokens
from theloom.store.writer import ShardWriter


class Ranges(SimpleHTTPRequestHandler):
    """GETs of S3, with the path in front as the bucket: the kernel sends the bytes of a file."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Send a range of a file."""
        path = Path(self.directory) / self.path.partition("?")[0].lstrip("/")
        if not path.is_file():
            self._answer(404, 0)
            return
        size = path.stat().st_size
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last or size) + 1, size)
        self._answer(206, stop - start, f"bytes {start}-{stop - 1}/{size}")
        self.wfile.flush()
        with path.open("rb") as file:
            self.connection.settimeout(None)
            while start < stop:
                start += os.sendfile(
                    self.connection.fileno(), file.fileno(), start, min(stop - start, 1 << 20)
                )

    def _answer(self, code: int, length: int, ranges: str = "") -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(length))
        if ranges:
            self.send_header("Content-Range", ranges)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


WIDTH, WINDOW = 1024, 1024
THREADS = 4


def write(path: Path, rows: int) -> None:
    """A shard of random rows, in windows of 1,024."""
    offsets = np.arange(0, rows + 1, WINDOW, dtype="<i8")
    windows = len(offsets) - 1
    of_row = np.arange(rows, dtype="<i4")
    tokens = ShardTokens(
        first_row=0,
        input_ids=of_row,
        document=of_row // WINDOW,
        position=of_row % WINDOW,
        document_offset=offsets,
        document_id=file_format.fixed_strings([f"d{n}" for n in range(windows)]),
        window_offset=offsets,
        window_document=np.arange(windows, dtype="<i4"),
    )
    attributes = provenance.attributes(
        "activations", kind="shard", shard=0, first_row=0, precision="fp32"
    )
    attributes |= {"batch_tokens": WINDOW, "chunk_size": WINDOW, "run_fingerprint": "bench"}
    points = residual_points(1, WIDTH)[:1]
    spec = ShardSpec(tokens, points, WINDOW, "fp32", windows, "bench", attributes)
    with ShardWriter(path, spec) as writer:
        for window in range(windows):
            writer.write(window, points[0].name, 0, torch.randn(WINDOW, WIDTH))
            writer.batch_done((window + 1) * WINDOW, last=window == windows - 1)
        writer.finish()


def seconds(work: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Run the rounds, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=64, help="MiB of rows")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    rows = (arguments.mib << 20) // (4 * WIDTH) // WINDOW * WINDOW
    with tempfile.TemporaryDirectory() as folder:
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=folder))
        process = multiprocessing.get_context("fork").Process(target=server.serve_forever)
        process.start()
        os.environ |= {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        }
        try:
            measure(Path(folder), rows, arguments.rounds)
        finally:
            process.kill()


def measure(folder: Path, rows: int, rounds: int) -> None:
    """Push a file to the folder that is served, and read its rows in each way."""
    s3, path = boto3.client("s3"), folder / "activations.h5"
    write(path, rows)
    push(path, f"file://{folder}/bench/run")
    with file_format.reading(path) as file:
        listed = index.of(file, path)
    (name,) = (name for name in listed.datasets if name.startswith("hooks/"))
    ((offset, size),) = listed.datasets[name].extents
    acts = theloom.open("s3://bench/run")
    (hook,) = acts.hooks

    url, fs = "s3://bench/run/activations.h5", fsspec.filesystem("s3")

    def get(start: int, stop: int) -> bytes:
        answer = s3.get_object(
            Bucket="bench", Key="run/activations.h5", Range=f"bytes={start}-{stop - 1}"
        )
        return answer["Body"].read()

    def in_threads() -> list[bytes]:
        step = -(-size // THREADS)
        starts = range(offset, offset + size, step)
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(lambda s: get(s, min(s + step, offset + size)), starts))

    ways: dict[str, Callable[[], object]] = {
        "one GET": lambda: get(offset, offset + size),
        f"{THREADS} GETs at once": in_threads,
        "fsspec's cat_file": lambda: fs.cat_file(url, start=offset, end=offset + size),
        "theloom.open": lambda: acts[hook][:],
    }
    assert acts[hook][:].numpy().tobytes() == get(offset, offset + size) == b"".join(in_threads())
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            times[name].append(seconds(work))
    print(f"{size / 2**20:.0f} MiB of rows, {rounds} rounds")
    ours = times.pop("theloom.open")
    print(f"{'theloom.open':16} {size / statistics.median(ours) / 1e6:6.0f} MB/s")
    for name, plain in times.items():
        ratios = sorted(p / o for p, o in zip(plain, ours, strict=True))
        print(
            f"{name:16} {size / statistics.median(plain) / 1e6:6.0f} MB/s; theloom.open reads at "
            f"{statistics.median(ratios):.2f} of it ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
