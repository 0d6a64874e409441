"""The gather_answers stage: prompts with their answers, as documents that are extracted.

`answers.h5` has the format of `tokens.h5`: a document is a prompt and one of its answers, called
`id#sample`. The group `answers` has a row for each document besides.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash

from theloom.answers.answer import STOP_REASONS, Answer, read_shard
from theloom.answers.given import answers_in
from theloom.config.answers import COLUMNS
from theloom.config.frozen import to_plain
from theloom.config.schema import Config
from theloom.corpus import prompts
from theloom.corpus.encoding import Encoder
from theloom.corpus.kept import KeptRows
from theloom.corpus.spooled.spool import Numbers, Strings
from theloom.corpus.tokens_file import growing
from theloom.corpus.vocabulary import Vocabulary
from theloom.corpus.windows import write_tables
from theloom.errors import CorpusError, StoreError, printable
from theloom.rows import roles
from theloom.rows.document import Document
from theloom.store import file_format, provenance, token_texts
from theloom.store.hdf5.output import written
from theloom.store.tables import columns, texts
from theloom.store.tables import tokens as token_tables
from theloom.store.tables.columns import Column

log = logging.getLogger(__name__)

# of all shards of a run the same
_ALIKE = ("model_fingerprint", "precision", "quantization", "package_versions")
_ADDED = ("seconds", "seconds_sampling", "tokens_sampled", "tokens_alone")

_OF_CORPUS = (
    "tokenizer",
    "tokenizer_revision",
    "tokenizer_class",
    "tokenizer_difference",
    "double_bos_documents",
    "vocab_size",
    "characters",
    "assistant_tokens",
    "corpus",
    "empty_documents",
    "context_length",
)


@dataclass(frozen=True)
class _Prompt:
    number: int
    id: str
    hash: str
    ids: np.ndarray
    tables: dict[str, np.ndarray]
    text: str
    columns: dict[str, Any]
    given: str = ""  # what the column of answers holds, as JSON


def gather(config: Config, prompts_path: Path, shards: Sequence[Path], output: Path) -> None:
    """Write `answers.h5`: the stage gather_answers.

    Args:
        config: The settings of the stage.
        prompts_path: Path of `tokens.h5`.
        shards: The files of sampled answers; none where a column holds them.
        output: The file.

    Raises:
        CorpusError: An answer cannot follow its prompt, or no row is kept.
        StoreError: Shards are of other prompts, or not of one model.
    """
    sampled, about = _read_shards(shards)
    encoder, vocabulary = Encoder(config), Vocabulary(config.model)
    with file_format.open_h5(prompts_path, "tokens") as file:
        attributes = dict(file.attrs)
        context = int(attributes["context_length"])
        _check_whole(sampled, about, attributes, file, config)
        described = json.loads(attributes["columns"])
        count = len(file["documents/id"])
        found = columns.read(lambda n: file[n][:] if n in file else None, described, count)
        writer = _Writer(config, encoder, vocabulary, context, output)
        with written(output) as out:
            writer.begin(out)
            for prompt in _prompts(file, found):
                if not shards:
                    answers = [*_given(prompt, encoder, config.answers.column or "")]
                else:
                    answers = sampled[prompt.number]
                for answer in answers:
                    writer.add(prompt, answer)
                out.check()
            about |= {n: attributes[n] for n in _OF_CORPUS}
            about["prompts_hash"] = attributes["tokens_hash"]
            writer.finish(found, about)
    log.info(
        "%d answers to %d documents: %d tokens, %s",
        *(len(writer.answers), count, sum(len(a.ids) for a in writer.answers)),
        ", ".join(f"{n} end by {reason}" for reason, n in writer.reasons.items()),
    )


def _read_shards(shards: Sequence[Path]) -> tuple[dict[int, list[Answer]], dict[str, Any]]:
    """The answers by document, and what their files say. Raises StoreError."""
    sampled: dict[int, list[Answer]] = {}
    about: dict[str, Any] = dict.fromkeys(_ADDED, 0) if shards else {}
    for path in shards:
        answers, attributes = read_shard(path)
        for answer in answers:
            sampled.setdefault(answer.document, []).append(answer)
        for name in (*_ALIKE, "prompts_hash"):
            if about.setdefault(name, attributes[name]) != attributes[name]:
                raise StoreError(
                    f"{path}: its answers have another {name.replace('_', ' ')} than those of "
                    f"{shards[0]} ({printable(str(attributes[name]))[:80]}); run again with "
                    "--forcerun sample_answers"
                )
        for name in _ADDED:
            about[name] += attributes.get(name, 0)
        if answers:
            about |= {name: attributes[name] for name in ("device", "side_by_side")}
    return sampled, about


def _check_whole(
    sampled: Mapping[int, list[Answer]],
    about: dict[str, Any],
    attributes: Mapping[str, Any],
    file: h5py.File,
    config: Config,
) -> None:
    """Check that each prompt has its answers. Raises StoreError."""
    if not about:
        return
    count, samples = len(file["documents/id"]), list(range(config.answers.samples))
    whole = all([a.sample for a in sampled.get(n, ())] == samples for n in range(count))
    if about.pop("prompts_hash") != attributes["tokens_hash"] or not whole:
        raise StoreError(
            f"{file.filename}: the sampled answers are to other documents; run again with "
            "--forcerun sample_answers"
        )


def _prompts(file: h5py.File, found: Mapping[str, Column]) -> Iterator[_Prompt]:
    tables = {n: file[p][:] for n in token_tables.TYPES if (p := token_tables.path(n)) in file}
    ids, offset = file["tokens/input_ids"][:], file["documents/offset"][:].tolist()
    names, hashes = (file[f"documents/{n}"][:].tolist() for n in ("id", "text_hash"))
    of_prompts = texts.read(file, prompts.TEXT)
    given = texts.read(file, prompts.GIVEN) if prompts.GIVEN in file else [""] * len(names)
    values = {name: column.tolist() for name, column in found.items()}
    for n, (a, b) in enumerate(pairwise(offset)):
        yield _Prompt(
            number=n,
            id=names[n].decode(),
            hash=hashes[n].decode(),
            ids=ids[a:b],
            tables={name: table[a:b] for name, table in tables.items()},
            text=of_prompts[n],
            columns={name: value[n] for name, value in values.items()},
            given=given[n],
        )


def _given(prompt: _Prompt, encoder: Encoder, column: str) -> Iterator[Answer]:
    """The answers that a column holds. Raises CorpusError."""
    where = f"document {printable(prompt.id)!r}, answers.column={column}"
    for sample, given in enumerate(answers_in(json.loads(prompt.given), where)):
        ids = given.ids
        if ids is None:
            ids = encoder.continued(prompt.ids.tolist(), prompt.text, given.text)
        if ids is None:
            raise CorpusError(
                f"{where}: the tokenizer gives the answer {printable(given.text)[:40]!r} other "
                "tokens by itself than behind its prompt, so they cannot be told; give token ids"
            )
        unknown = (float("nan"),) * len(ids)
        probabilities = unknown if given.log_probabilities is None else given.log_probabilities
        yield Answer(prompt.number, sample, 0, given.stop_reason, (*ids,), (*probabilities,))


class _Writer:
    """Writes prompts with answers as documents."""

    def __init__(
        self, config: Config, encoder: Encoder, vocabulary: Vocabulary, context: int, output: Path
    ) -> None:
        self._config, self._encoder, self._vocabulary = config, encoder, vocabulary
        self._context, self._output = context, output
        self.answers: list[Answer] = []
        self._ids, self._hashes = Strings(), Strings()
        self._lengths = Numbers()
        self._texts: list[str] = []
        self._prompts: list[_Prompt] = []
        self._hash, self._occurring = xxhash.xxh3_128(), set[int]()

    @property
    def reasons(self) -> Counter[str]:
        """How many answers end by each stop reason."""
        return Counter(answer.stop_reason for answer in self.answers)

    def begin(self, file: h5py.File) -> None:
        """Begin the file."""
        self._file, self._growing = file, growing.Growing(file)
        self._kept = KeptRows(self._config.rows, file)

    def add(self, prompt: _Prompt, answer: Answer) -> None:
        """Add a document. Raises CorpusError."""
        name = f"{prompt.id}#{answer.sample}"
        ids = self._vocabulary.check(
            [*prompt.ids.tolist(), *answer.ids], printable(name), self._encoder.names
        )
        if self._context and len(ids) > self._context:
            raise CorpusError(
                f"document {printable(name)!r}: prompt and answer have {len(ids)} tokens, more "
                f"than the context of {self._context}; shorten it, or raise corpus.context_length "
                "where the model allows more"
            )
        tables, text, written_text = self._tables(prompt, answer)
        tables |= self._encoder.special(ids)
        known = {name: t for name, t in tables.items() if name != "kept"}
        own = {"answer_prompt": prompt.id, "answer_sample": answer.sample}
        document = Document(
            id=name,
            tokens=len(ids),
            text=text,
            columns={**prompt.columns, **own, "answer_stop": answer.stop_reason},
            **known,
        )
        self._growing.add({"input_ids": ids, **tables, **self._kept.add(document)})
        self._hash.update(ids.tobytes())
        self._occurring.update(np.unique(ids).tolist())
        self._ids.append(name)
        self._hashes.append(prompt.hash)
        self._lengths.append(len(ids))
        self._texts.append(written_text)
        self._prompts.append(prompt)
        self.answers.append(answer)

    def _tables(
        self, prompt: _Prompt, answer: Answer
    ) -> tuple[dict[str, np.ndarray], str | None, str]:
        """The tables of a document's tokens, its text where its characters are known, and the
        answer's text.
        """
        before, count = len(prompt.ids), len(answer.ids)
        tables = {
            "role": np.full(before + count, roles.code("text"), "u1"),
            "generated": np.repeat(np.array([0, 1], "u1"), [before, count]),
        }
        tables["role"][before:] = roles.code("assistant")
        if (role := prompt.tables.get("role")) is not None:
            tables["role"][:before] = role
        if (message := prompt.tables.get("message")) is not None:
            number = int(message.max(initial=-1)) + 1
            tables["message"] = np.append(message, np.full(count, number, "<i4"))
        decoded = self._encoder.decoded(prompt.ids.tolist(), answer.ids)
        text, places = decoded or ("", None)
        if places is None or "char_start" not in prompt.tables:
            return tables, None, text
        places = places + len(prompt.text)
        places[places[:, 0] == places[:, 1]] = -1
        for name, values in zip(("char_start", "char_end"), places.T, strict=True):
            tables[name] = np.append(prompt.tables[name], values).astype("<i4")
        return tables, prompt.text + text, text

    def finish(self, found: Mapping[str, Column], about: Mapping[str, Any]) -> None:
        """Write what is known when all documents are there. Raises CorpusError."""
        self._growing.write()
        config, file = self._config, self._file
        shards = config.extraction.shards or 1
        write_tables(file, self._ids, self._hashes, self._lengths, self._context, shards)
        typed = self._columns(found)
        columns.write(file, typed)
        token_texts.write(file, self._encoder.texts(self._occurring))
        self._write_answers()
        attributes = provenance.attributes(
            "tokens",
            **{n: v for n, v in about.items() if n in _OF_CORPUS},
            config=to_plain(config),
            columns=columns.described(typed),
            tables_hash=growing.tables_hash(file),
            tokens_hash=self._hash.hexdigest(),
            corpus_hash=self._hashes.digest(),
            truncated_from=0,
            **self._kept.finish(len(self._ids)),
        )
        file_format.set_attributes(file, attributes)
        own = {n: v for n, v in about.items() if n not in _OF_CORPUS}
        settings = to_plain(config)["answers"]
        file_format.set_attributes(file["answers"], {**settings, **own})

    def _columns(self, found: Mapping[str, Column]) -> dict[str, Column]:
        """The corpus' columns, and what the run says of each answer."""
        of_prompt = np.array([p.number for p in self._prompts])
        typed = {name: column.part(of_prompt) for name, column in found.items()}
        names = [p.id for p in self._prompts]
        reasons = np.array([STOP_REASONS.index(a.stop_reason) for a in self.answers], "<i4")
        own = (
            Column("string", file_format.fixed_strings(names)),
            Column("integer", np.array([a.sample for a in self.answers], "<i8")),
            Column("category", reasons, file_format.fixed_strings([*STOP_REASONS])),
        )
        return typed | dict(zip(COLUMNS, own, strict=True))

    def _write_answers(self) -> None:
        answers, file = self.answers, self._file
        file["answers/prompt"] = np.array([a.document for a in answers], "<i8")
        file["answers/sample"] = np.array([a.sample for a in answers], "<i4")
        file["answers/seed"] = np.array([a.seed for a in answers], "<i8")
        file["answers/stop_reason"] = file_format.fixed_strings([a.stop_reason for a in answers])
        file["answers/offset"] = np.cumsum([0, *(len(a.ids) for a in answers)]).astype("<i8")
        found = [p for a in answers for p in a.log_probabilities]
        file["answers/log_probability"] = np.array(found, "<f4")
        texts.write(file, "answers/text", self._texts)
