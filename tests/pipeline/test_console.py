"""What Snakemake's messages are shortened to."""

import logging

import pytest
from theloom.pipeline import console, job


def record(text: str = "", **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("snakemake.logging", logging.INFO, "", 0, text, None, None)
    made.__dict__.update(fields)
    return made


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Select jobs to execute...", False),
        ("Execute 2 jobs...", False),
        ("Adding norms.svg (29.63 KB).", False),
        ("Report created.", True),
        ("Nothing to be done (all requested files are present and up to date).", True),
        ("Complete log(s): x.log", True),
    ],
)
def test_bookkeeping_is_left_out_and_the_rest_kept(text, kept):
    assert console.Brief().filter(record(text)) is kept


def test_snakemake_s_own_end_is_left_out_once_the_errors_are_printed():
    brief = console.Brief()
    failed = "WorkflowError:\nAt least one job did not complete successfully."
    assert brief.filter(record(failed))
    brief.ended = True
    assert not brief.filter(record(failed))


def test_freezing_a_config_is_not_shown_nor_its_progress():
    brief = console.Brief()
    assert not brief.filter(record(event="job_info", rule_name="freeze_config", jobid=3))
    assert not brief.filter(record(event="job_finished", job_id=3))
    assert not brief.filter(record(event="progress"))
    assert brief.filter(record(event="job_info", rule_name="load_model", jobid=4))
    assert not brief.filter(record(event="job_finished", job_id=4))
    assert brief.filter(record(event="progress"))


def test_a_job_that_ended_on_a_user_s_error_is_that_line(tmp_path):
    log = tmp_path / "job.log"
    log.write_text("much\nerror: what was requested, what to do\n")
    brief = console.Brief()
    for retries, said in (
        (0, "failed, the error is at the end"),  # where it then is printed, once
        (3, "error: what was requested, what to do"),  # a later attempt may pass: no end has it
    ):
        brief.retries = retries
        changed = record("Error in rule x, jobid: 1", event="job_error", log=[str(log)])
        assert brief.filter(changed)
        assert (changed.getMessage(), changed.__dict__["event"]) == (f"{said} (log: {log})", None)


def test_a_job_that_ended_otherwise_keeps_snakemake_s_block(tmp_path):
    log = tmp_path / "job.log"
    log.write_text("Traceback …\nValueError: x\n")
    assert job.error_of(log) is None
    for logs in ([str(log)], [str(tmp_path / "none.log")], None):
        changed = record("Error in rule x", event="job_error", log=logs)
        assert console.Brief().filter(changed)
        assert changed.__dict__["event"] == "job_error"


def test_a_call_beside_another_says_so_and_how_to_unlock(project):
    locks = project.folder / ".snakemake/locks"
    locks.mkdir(parents=True)
    (locks / "0.output.lock").write_text("results/smollm2-135m/estimate.h5\n")
    done = project.snakemake(profiles="smollm2-135m")
    assert done.returncode != 0
    last = (done.stdout + done.stderr).splitlines()[-1]
    assert last == console.LOCKED
    assert project.snakemake("--unlock", profiles="smollm2-135m").returncode == 0
    assert not list(locks.parent.glob("locks/*"))


def test_a_failed_call_ends_on_the_error_s_line(project):
    done = project.snakemake(
        "--until", "load_model", profiles="smollm2-135m", overrides="corpus.context_length=100000"
    )
    printed = done.stdout + done.stderr
    assert done.returncode != 0
    assert printed.splitlines()[-1].startswith("error: corpus.context_length")
    assert printed.count("is more than the model's") == 1
    for left_out in (
        "Reason:",
        "RuleException",
        "freeze the config",
        "Select jobs",
        "=====",
        "WorkflowError",
    ):
        assert left_out not in printed
    assert "turn the corpus into tokens" in printed
