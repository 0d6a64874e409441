"""Snakemake's messages, shortened to what a user needs.

Its own bookkeeping is left out. A job that ended on a user's error is one line instead of a block,
and the message of a lock explains how to remove it. Everything else stays as Snakemake wrote it.
"""

import logging
from pathlib import Path
from typing import Any

from theloom.config import locations
from theloom.dataset import activations, parts
from theloom.errors import StoreError
from theloom.pipeline.job import error_of
from theloom.terminal import lines
from theloom.verification import encoding, recorded

_BOOKKEEPING = (
    "Select jobs to execute",
    "Execute ",
    "Assuming unrestricted shared filesystem usage",
    "Building DAG of jobs",
    "Using shell: ",
    "Creating report...",
    "Loading script code for rule ",
    "Adding ",  # a file to the report
    "Conda environments: ignored",
    "Singularity containers: ignored",
    # where our scripts are called; the job's log has the reason
    "RuleException:\nCalledProcessError in file",
)

_END = ("Complete log(s): ", "Elapsed time: ", "WorkflowError:\nAt least one job did not complete")
_QUIET_RULE = "freeze_config"  # seven jobs of a moment each

LOCKED = (
    "error: another call of the pipeline is making the same files: wait for it. If there is none "
    f"(one was killed), run {locations.program('snakemake')} --unlock, then this again"
)


class Brief(logging.Filter):
    """Drops and rewrites records of Snakemake's logger. `ended` is set when the call's errors have
    been printed. Where a failed job is not started again (`retries` is 0), its error is left to the
    end of the call, so that it is printed once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.retries = 0
        self.ended = False
        self._quiet_jobs: set[int] = set()
        self._skip_progress = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Drop or rewrite a record.

        Args:
            record: Of Snakemake's logger; its message is changed where it is shortened.

        Returns:
            Whether the record is printed.
        """
        fields: dict[str, Any] = record.__dict__
        event = str(fields.get("event") or "")
        if event == "resources_info":
            return False
        if event == "job_info" and fields["rule_name"] == _QUIET_RULE:
            self._quiet_jobs.add(fields["jobid"])
            return False
        if event == "job_finished":  # the progress that follows has it too
            self._skip_progress = fields["job_id"] in self._quiet_jobs
            return False
        if event == "progress":
            return not self._skip_progress
        if event == "job_error":
            self._shorten(record, [Path(file) for file in fields.get("log") or []])
            return True
        text = str(record.msg)
        if text.startswith("LockException:"):
            _replace(record, LOCKED)
        return not text.startswith(_BOOKKEEPING + (_END if self.ended else ()))

    def _shorten(self, record: logging.LogRecord, logs: list[Path]) -> None:
        """Put a line in place of Snakemake's block, where the job ended on a user's error."""
        for file in logs:
            if error := error_of(file):
                at_the_end = f"failed, the error is at the end (log: {file})"
                _replace(record, f"{error} (log: {file})" if self.retries else at_the_end)


def _replace(record: logging.LogRecord, text: str) -> None:
    record.msg, record.args = text, None
    record.__dict__["event"] = None


def shorten() -> Brief:
    """Shorten the messages of this process's Snakemake from now on.

    Returns:
        The filter that does so.
    """
    brief = Brief()
    logging.getLogger("snakemake.logging").addFilter(brief)
    return brief


def summary(folder: Path) -> str:
    """A few lines on a finished run: the file, what it holds, and how it was verified.

    Args:
        folder: Of the run, with `activations.h5` and `verification.h5`.

    Returns:
        The lines, in one text.

    Raises:
        StoreError: A file is missing or damaged.
    """
    path = folder / "activations.h5"
    try:
        acts = activations.open_activations(path)
    except StoreError:
        if (url := parts.removed_to(path)) is None:
            raise
        moved = [f"{path}", f"  its rows are at {url}, and no more here"]
        return "\n".join([*moved, f"  next: {locations.program('theloom')} inspect {url}"])
    found = recorded.read(folder / "verification.h5")
    nearest = int((found.errors / found.allowed).argmax())
    size = sum(acts[hook].nbytes for hook in acts.hooks)
    text_lines = [
        f"{acts.path}",
        f"  {_rows(acts)} of {acts.document_count} documents in {acts.stored_as}, "
        f"{size / 1e6:.1f} MB",
        f"  hook points: {_few_hooks(acts.hooks)}",
        f"  verified: {found.documents} documents recomputed, largest error "
        f"{found.errors[nearest]:.1e} "
        f"of the largest value (at most {found.allowed[nearest]:.0e}); all rows' hashes are right",
    ]
    if found.cost is not None:
        text_lines.append(f"  {encoding.words(acts.stored_as, found.cost)}")
    if found.cosine is not None:
        quantization = acts.attributes["model_quantization"]
        text_lines.append(
            f"  {quantization} weights: residuals' cosine similarity to FP32 "
            f"{found.cosine.min():.4f} or more"
        )
    return "\n".join([*map(lines, text_lines), *_next_steps(folder, acts.path)])


def _rows(acts: activations.Activations) -> str:
    """How many rows there are; without `rows.keep` and `rows.pool` each is a token."""
    tokens = acts.attributes.get("tokens")
    return f"{len(acts):,} tokens" if tokens is None else f"{len(acts):,} rows of {tokens:,} tokens"


def _next_steps(folder: Path, path: Path) -> list[str]:
    """What to do with a finished run, as commands to paste."""
    report = (
        "make report, with the same PROFILES and SET"
        if locations.checkout()
        else "theloom report, with the same words"
    )
    if (page := folder / "report.html").exists():
        report = f"open {page} in a browser"
    figures = [report] if page.exists() or not (folder / "figures").is_dir() else []
    first, *others = [*figures, f"{locations.program('theloom')} inspect {path}"]
    return [f"  next: {first}", *(f"        {command}" for command in others)]


def _few_hooks(hooks: list[str]) -> str:
    return (
        ", ".join(hooks) if len(hooks) <= 4 else f"{hooks[0]} … {hooks[-1]} ({len(hooks)} in all)"
    )
