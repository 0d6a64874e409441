"""What a job leaves in its log, and how it ends."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from theloom.pipeline import retries
from theloom.pipeline.job import last_errors

BODY = """
import logging, os, sys
from theloom.errors import CorpusError, MemoryPlanError
from theloom.pipeline.job import job
with job(sys.argv[1], 2, {online}):
    print("to stdout")
    os.system("echo from another program")
    logging.getLogger("x").info("a line")
    {ending}
"""


def run(tmp_path: Path, ending: str, online: bool = False) -> tuple[int, str, str]:
    log = tmp_path / "x.log"
    script = BODY.format(ending=ending, online=online)
    done = subprocess.run(
        [sys.executable, "-u", "-c", script, str(log)], capture_output=True, text=True
    )
    return done.returncode, log.read_text(), done.stdout + done.stderr


def test_everything_goes_to_the_log(tmp_path):
    code, log, console = run(tmp_path, "pass")
    assert (code, console) == (0, "")
    assert "to stdout" in log
    assert "from another program" in log
    assert "a line" in log


def test_a_user_s_error_is_one_line_and_no_traceback(tmp_path):
    code, log, _ = run(tmp_path, "raise CorpusError('x.txt: not utf-8')")
    assert code == 1
    assert log.splitlines()[-1] == "error: x.txt: not utf-8"
    assert "Traceback" not in log


def test_memory_that_ran_out_is_one_line_too(tmp_path):
    for ending in (
        "raise MemoryError",
        "import torch; raise torch.OutOfMemoryError('CUDA out of memory')",
    ):
        code, log, _ = run(tmp_path, ending)
        assert code == 1
        assert "memory ran out; lower extraction.batch_tokens" in log.splitlines()[-1]
        assert "Traceback" not in log


def test_a_defect_keeps_its_traceback(tmp_path):
    code, log, _ = run(tmp_path, "raise ZeroDivisionError")
    assert code == 1
    assert "Traceback" in log


def test_errors_of_this_call_are_gathered_and_older_ones_are_not(tmp_path):
    began = time.time() - 1
    run(tmp_path, "raise CorpusError('x.txt: not utf-8')")
    log = tmp_path / "x.log"
    assert last_errors([log], began) == [f"error: x.txt: not utf-8 (log: {log})"]
    assert last_errors([log], time.time() + 60) == []


def test_a_retry_ends_at_once_where_the_first_try_was_the_user_s_error(tmp_path, monkeypatch):
    monkeypatch.setenv(retries.CALL, "first")
    log = tmp_path / "x.log"
    run(tmp_path, "raise CorpusError('x.txt: not utf-8')")
    code, again, _ = run(tmp_path, "print('tried')")
    assert (code, again) == (1, "error: x.txt: not utf-8\n")
    monkeypatch.setenv(retries.CALL, "second")  # the user has mended the file in between
    assert run(tmp_path, "print('tried')")[0] == 0
    assert retries.recorded(log) is None


@pytest.mark.parametrize(
    "ending", ["raise MemoryPlanError('too small')", "raise OSError(28, 'full')", "raise KeyError"]
)
def test_a_retry_is_made_where_another_node_may_do(tmp_path, monkeypatch, ending):
    monkeypatch.setenv(retries.CALL, "first")
    run(tmp_path, ending)
    assert run(tmp_path, "print('tried')")[0] == 0


def test_a_retry_asks_the_hub_again(tmp_path, monkeypatch):
    monkeypatch.setenv(retries.CALL, "first")
    run(tmp_path, "raise CorpusError('the hub does not answer')", online=True)
    assert run(tmp_path, "print('tried')", online=True)[0] == 0


SECRET = "hf_notARealTokenButSecret"


def test_a_job_is_offline_and_sees_no_token_but_the_one_that_fetches_does(tmp_path):
    tell = "import os; print(os.environ.get('HF_HUB_OFFLINE'), os.environ.get('HF_TOKEN'))"
    for online, expected in ((False, "1 None"), (True, f"None {SECRET}")):
        log = str(tmp_path / "log")
        script = f"from theloom.pipeline.job import job\nwith job({log!r}, online={online}): {tell}"
        environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {
            "HF_TOKEN": SECRET
        }
        subprocess.run([sys.executable, "-c", script], env=environment, check=True)
        assert (tmp_path / "log").read_text().strip() == expected


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("", "", "expandable_segments:True"),
        ("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64", None),
        ("PYTORCH_ALLOC_CONF", "expandable_segments:False", "expandable_segments:False"),
    ],
)
def test_segments_grow_unless_the_user_set_the_allocator(tmp_path, name, value, expected):
    script = (
        "import os; from theloom.pipeline.job import job\n"
        f"with job({str(tmp_path / 'log')!r}): print(os.environ.get('PYTORCH_ALLOC_CONF'))"
    )
    environment = {k: v for k, v in os.environ.items() if not k.endswith("ALLOC_CONF")}
    environment |= {name: value} if name else {}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    assert (tmp_path / "log").read_text().strip() == str(expected)
