"""An answer, and the files that hold answers: the lines of an unfinished shard, and a shard."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from theloom.store import file_format, provenance
from theloom.store.hdf5.output import written
from theloom.store.lock import WriterLock

STOP_REASONS = ("eos", "stop", "length", "context", "given")
"""Why an answer ends: the model's own end, a text of `answers.stop`, `answers.max_new_tokens`, the
end of the context, or the column that holds it does not say."""

KIND = "answers"  # of a shard's file


@dataclass(frozen=True)
class Answer:
    """One answer to a document.

    Attributes:
        document: Number of the document.
        sample: Number of the answer among those to it.
        seed: Of its draws; 0 where another engine wrote it.
        stop_reason: One of `STOP_REASONS`.
        ids: Its tokens.
        log_probabilities: Of each of them, as the model gives them (at temperature 1, of all
            tokens); NaN where they are not known.
    """

    document: int
    sample: int
    seed: int
    stop_reason: str
    ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]


def seed_of(seed: int, document: str, sample: int) -> int:
    """The seed of an answer: of the document's id and the sample alone, so that it is the same
    whatever is sampled beside it.

    Args:
        seed: Of the run, from its config.
        document: The id of the document.
        sample: Number of the answer among those of its document, from 0.

    Returns:
        A number from 0 to 2^32 - 1.

    Examples:
        >>> seed_of(0, "a", 0) == seed_of(0, "a", 0), seed_of(0, "a", 0) == seed_of(0, "a", 1)
        (True, False)
    """
    digest = sha256(json.dumps([seed, document, sample]).encode()).digest()
    return int.from_bytes(digest[:4], "little")


class PartialAnswers:
    """The answers of a shard so far, one line of JSON each, in `<shard>.partial`.

    A job that is killed loses the answers that it has not ended. A line that a power cut has torn
    is left out.

    Args:
        output: The file of the finished shard.
        fingerprint: Of all that decides the answers; lines of another one are dropped.
    """

    def __init__(self, output: Path, fingerprint: str) -> None:
        self._path = output.with_name(output.name + ".partial")
        self._head = {"fingerprint": fingerprint}
        self._lock = WriterLock(self._path)
        self.found: list[Answer] = []

    def __enter__(self) -> "PartialAnswers":
        self._lock.take()
        lines = [*_whole_lines(self._path)]
        if lines[:1] == [self._head]:
            self.found = [_answer(line) for line in lines[1:]]
        new = self._path.with_name(self._path.name + ".new")
        with new.open("w", encoding="utf-8") as file:
            file.writelines(map(_line, [self._head, *map(_fields, self.found)]))
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8")
        return self

    def add(self, answer: Answer) -> None:
        """Write an answer, on the disk when this returns.

        Args:
            answer: The next one that is complete.
        """
        self.found.append(answer)
        self._file.write(_line(_fields(answer)))
        self._file.flush()
        os.fsync(self._file.fileno())

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._lock.release()

    def remove(self) -> None:
        """Remove the lines, once the shard is finished."""
        self._path.unlink(missing_ok=True)


def _line(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields) + "\n"


def _fields(answer: Answer) -> dict[str, Any]:
    return vars(answer)


def _answer(fields: Mapping[str, Any]) -> Answer:
    lists = {name: tuple(fields[name]) for name in ("ids", "log_probabilities")}
    return Answer(**{**fields, **lists})


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            yield json.loads(line)
        except ValueError:
            return  # torn: nothing was written behind it


def write_shard(path: Path, answers: Sequence[Answer], attributes: Mapping[str, Any]) -> None:
    """Write a shard's answers, sorted; the file is there once all of it is on the disk.

    Args:
        path: The file.
        answers: The answers.
        attributes: What its root says of how they were sampled.
    """
    new = path.with_name(path.name + ".new")
    answers = sorted(answers, key=lambda a: (a.document, a.sample))
    with written(new) as file:
        file_format.set_attributes(file, provenance.attributes(KIND, **attributes))
        file["document"] = np.array([a.document for a in answers], "<i8")
        file["sample"] = np.array([a.sample for a in answers], "<i4")
        file["seed"] = np.array([a.seed for a in answers], "<i8")
        file["stop_reason"] = file_format.fixed_strings([a.stop_reason for a in answers])
        file["offset"] = np.cumsum([0, *(len(a.ids) for a in answers)]).astype("<i8")
        file["input_id"] = np.array([i for a in answers for i in a.ids], "<i4")
        file["log_probability"] = np.array([p for a in answers for p in a.log_probabilities], "<f4")
    file_format.sync(new)
    new.replace(path)
    file_format.sync(path.parent)


def read_shard(path: Path) -> tuple[list[Answer], dict[str, Any]]:
    """Read what `write_shard` wrote.

    Args:
        path: Of the shard of answers.

    Returns:
        The answers in the order of the file, and its attributes as plain Python values.

    Raises:
        StoreError: The file is missing, damaged or another one.
    """
    with file_format.open_h5(path, KIND) as file:
        names = ("document", "sample", "seed", "stop_reason")
        rows = zip(*(file[name][:].tolist() for name in names), strict=True)
        ids, found = file["input_id"][:].tolist(), file["log_probability"][:].tolist()
        answers = [
            Answer(document, sample, seed, reason.decode(), tuple(ids[a:b]), tuple(found[a:b]))
            for (document, sample, seed, reason), (a, b) in zip(
                rows, pairwise(file["offset"][:].tolist()), strict=True
            )
        ]
        return answers, {n: getattr(v, "item", lambda v=v: v)() for n, v in file.attrs.items()}
