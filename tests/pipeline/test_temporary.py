"""Temporary folders: one that a killed process left goes with the next start, those of living ones
stay.
"""

import multiprocessing
import os
import signal
import tempfile

import pytest
from theloom.pipeline.temporary import temporary_folder

PREFIX = "theloom-test-"


class Owner:
    """What a folder belongs to."""


@pytest.fixture
def parent(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def started(die: bool):
    """A process with a folder, which it tells of; then it is killed, or waits to be asked."""
    processes = multiprocessing.get_context("fork")
    ours, its = processes.Pipe()

    def work() -> None:
        owner = Owner()
        folder, _ = temporary_folder(owner, PREFIX)
        (folder / "tokens.h5").write_bytes(b"rows")
        its.send(folder)
        if die:
            os.kill(os.getpid(), signal.SIGKILL)
        its.recv()

    process = processes.Process(target=work)
    process.start()
    return process, ours, ours.recv()


def test_a_folder_of_a_killed_process_goes_and_that_of_a_living_one_stays(parent):
    living, pipe, its_folder = started(die=False)
    killed, _, left = started(die=True)
    killed.join()
    assert left.is_dir()
    assert its_folder.is_dir()
    owner = Owner()
    folder, remove = temporary_folder(owner, PREFIX)
    assert not left.exists()
    assert (its_folder / "tokens.h5").is_file()
    assert folder.is_dir()
    remove()
    pipe.send("end")
    living.join()
    other, _ = temporary_folder(owner, PREFIX)  # the one that ended by itself left nothing
    assert [path.name for path in parent.iterdir() if path.is_dir()] == [other.name]


def test_a_folder_goes_with_what_it_belongs_to_and_not_with_a_fork(parent):
    owner = Owner()
    folder, _ = temporary_folder(owner, PREFIX)
    fork = multiprocessing.get_context("fork").Process(target=owner.__class__)
    fork.start()
    fork.join()
    assert folder.is_dir()
    del owner
    assert not list(parent.iterdir())
