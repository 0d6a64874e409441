"""The bars of running shards: on a terminal alone, above a clean last screen."""

import io
import logging
import os
import pty
import re
import select
import subprocess
import time

import preloading
import pytest
from theloom.engine import progress_file
from theloom.pipeline import bars


@pytest.fixture
def tiny(project, tiny_profile):
    tiny_profile(project)
    return project


def slow_batches(project) -> None:
    """Have each batch of the extraction take long enough for a bar to be drawn."""
    script = project.folder / "workflow/scripts/extract_shard.py"
    script.write_text(
        script.read_text().replace(
            "with job(",
            "import time\n"
            "from theloom.engine import progress\n"
            "update = progress.Progress.update\n"
            "def slow(self, *arguments, **named):\n"
            "    update(self, *arguments, **named)\n"
            "    time.sleep(0.3)\n"
            "progress.Progress.update = slow\n"
            "with job(",
            1,
        )
    )


def on_a_terminal(project, command: list[str]) -> str:
    """What a command writes to a terminal of 24 lines and 100 columns."""
    ours, theirs = pty.openpty()
    environment = preloading.environment() | {"TERM": "xterm", "COLUMNS": "100", "LINES": "24"}
    running = subprocess.Popen(
        command, cwd=project.folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    written, end = b"", time.monotonic() + 900
    while time.monotonic() < end:
        if select.select([ours], [], [], 0.5)[0]:
            try:
                written += os.read(ours, 65536)
            except OSError:  # all that had it open have ended
                break
    os.close(ours)
    assert running.wait(300) == 0, written.decode()
    return written.decode()


def screen_of(written: str) -> list[str]:
    """The lines that a terminal shows in the end: it knows what the bars use, and colors."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[\d*(?:;\d+)*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part == "\x1b[1A":
            row -= 1
        elif part == "\x1b[J":
            lines[row:] = [lines[row][:column]]
        elif not part.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return lines


def test_a_terminal_shows_a_bar_for_a_running_shard_and_ends_clean(tiny):
    slow_batches(tiny)
    written = on_a_terminal(tiny, tiny.command(profiles="tiny"))
    seen = re.findall(
        r"(0000[01]-of-00002) \[[#.]{24}\] +(\d+)% ([\d,]+) of ([\d,]+) tokens", written
    )
    assert {name for name, *_ in seen} == {"00000-of-00002", "00001-of-00002"}
    assert any(0 < int(percent) < 100 for _, percent, *_ in seen)
    screen = screen_of(written)
    assert not [line for line in screen if "[##" in line or "[.." in line]
    assert any("16 of 16 steps (100%) done" in line for line in screen)
    assert any("3,000 tokens of" in line for line in screen)
    assert not list(tiny.results("tiny").rglob("*.progress*"))


def test_without_a_terminal_there_is_no_bar(tiny):
    slow_batches(tiny)
    done = tiny.snakemake("--until", "extract_shard", profiles="tiny")
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    assert "\x1b" not in printed
    assert "[#" not in printed
    assert not list(tiny.results("tiny").rglob("*.progress*"))


def record(**fields: object) -> logging.LogRecord:
    made = logging.LogRecord("snakemake.logging", logging.INFO, "", 0, "", None, None)
    made.__dict__.update(fields)
    return made


def test_bars_are_of_running_jobs_and_go_before_other_lines(tmp_path, monkeypatch):
    stream = io.StringIO()
    drawn, log = bars.Bars(stream), tmp_path / "00000-of-00002.log"
    drawn.filter(record(event="job_info", jobid=3, log=[str(log)]))
    monkeypatch.setenv(progress_file.VARIABLE, str(bars.progress_of(log)))
    progress_file.report(4, 4, lambda: "4 of 4 tokens")
    drawn._draw()
    assert stream.getvalue() == f"00000-of-00002 [{'#' * 24}] 100% 4 of 4 tokens"
    drawn.write("a line of Snakemake's\n")
    assert screen_of(stream.getvalue()) == ["a line of Snakemake's", ""]
    drawn.filter(record(event="job_error", jobid=3))
    assert not list(tmp_path.iterdir())
    drawn._draw()
    assert screen_of(stream.getvalue()) == ["a line of Snakemake's", ""]


def test_a_dumb_terminal_or_a_pipe_gets_no_bars(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setenv("TERM", "xterm")
    assert bars.for_terminal(terminal) is not None
    assert bars.for_terminal(io.StringIO()) is None
    monkeypatch.setenv("TERM", "dumb")
    assert bars.for_terminal(terminal) is None
