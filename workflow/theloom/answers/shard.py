"""The sample_answers stage: the run's own model answers the documents of one shard."""

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from theloom.answers import sampler
from theloom.answers.answer import Answer, PartialAnswers, seed_of, write_shard
from theloom.answers.choice import Sampling
from theloom.answers.sampler import Generation, Row
from theloom.config.frozen import frozen_digest, load_frozen
from theloom.config.schema import Config
from theloom.corpus.tokenizer import CorpusTokenizer
from theloom.devices import accelerator, gpu
from theloom.engine.interrupts import StopRequest
from theloom.engine.progress import AnswersProgress
from theloom.errors import MemoryPlanError, ModelError, StoppedError
from theloom.model import weight_format
from theloom.model.checkpoint.signatures import files_fingerprint
from theloom.model.files import describe_tokenizer, hf_config, prepare_files
from theloom.model.loading import LoadedModel, Target, load_model, resolve_precision
from theloom.planning import answers_plan
from theloom.planning.estimates import estimate_file
from theloom.planning.estimates.estimate_file import Estimate
from theloom.planning.multi_gpu import available
from theloom.store import file_format, provenance

log = logging.getLogger(__name__)

_LAST_ATTEMPTS = 3  # failures of one answer by itself after which a job gives up


_Wanted = tuple[int, int, Row]  # document, sample, and the answer to be


@dataclass(frozen=True)
class _Prompts:
    """The documents of a shard."""

    first: int  # number of the first one
    ids: list[list[int]]
    names: list[str]
    context: int
    attributes: dict[str, Any]


def sample_answers(
    config_path: Path,
    estimate_path: Path,
    prompts_path: Path,
    shard: int,
    output: Path,
    oom_level: int = 0,
) -> None:
    """Run the sample_answers stage: sample the answers of one shard, or resume a partial one.

    Args:
        config_path: The frozen config of the stage.
        estimate_path: Path of `estimate.h5`.
        prompts_path: Path of `tokens.h5`.
        shard: Number of the shard, from 0.
        output: Path of the finished shard.
        oom_level: How many times the batch is halved from the start, since earlier jobs ran out of
            memory.

    Raises:
        ModelError: The model writes no text, or cannot be run.
        MemoryPlanError: Not even one answer fits.
        StoppedError: The job was requested to stop; what has ended is kept.
    """
    started = time.perf_counter()
    config, prompts = load_frozen(config_path), _read(prompts_path, shard)
    files, target = prepare_files(config.model), resolve_precision(config)
    about = {
        "model_fingerprint": files_fingerprint(files),
        "precision": target.precision.resolved,
        "quantization": str(weight_format.requested_quantization(config)),
        "prompts_hash": prompts.attributes["tokens_hash"],
    }
    versions = provenance.attributes("")["package_versions"]
    parts = [
        frozen_digest(config_path),
        about,
        [versions.get(p) for p in ("torch", "transformers")],
    ]
    parts.append(prompts.names)
    fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    with PartialAnswers(output, fingerprint) as partial:
        before, alone, way, sampling = len(partial.found), 0, "", 0.0
        wanted = _wanted(config, prompts, partial.found)
        if wanted:
            rows = _rows(config, target, wanted, estimate_file.read(estimate_path))
            loaded = load_model(config, files, target=target, lm_head=True)
            job = _Job(config, loaded, prompts, partial)
            job.run(wanted, max(1, rows >> oom_level))
            alone, way, sampling = job.alone, job.way, job.seconds
        found = partial.found
        write_shard(
            output,
            found,
            about
            | {
                "device": accelerator.name(target.device),
                "side_by_side": way,
                "seconds": time.perf_counter() - started,
                "seconds_sampling": sampling,
                "tokens_sampled": sum(len(a.ids) for a in found[before:]),
                "tokens_alone": alone,
            },
        )
        partial.remove()


def _read(path: Path, shard: int) -> _Prompts:
    with file_format.open_h5(path, "tokens") as file:
        first, last = (int(d) for d in file["shards/first_document"][shard : shard + 2])
        offset = file["documents/offset"][first : last + 1]
        ids = file["tokens/input_ids"][offset[0] : offset[-1]]
        offset = offset - offset[0]
        return _Prompts(
            first,
            [ids[a:b].tolist() for a, b in pairwise(offset)],
            [name.decode() for name in file["documents/id"][first:last].tolist()],
            int(file.attrs["context_length"]),
            dict(file.attrs),
        )


def _wanted(config: Config, prompts: _Prompts, found: Sequence[Answer]) -> list[_Wanted]:
    """Document, sample and row of each answer that is missing, the longest prompts first."""
    done = {(a.document, a.sample) for a in found}
    rows = []
    for number, (ids, name) in enumerate(zip(prompts.ids, prompts.names, strict=True)):
        most = config.answers.max_new_tokens
        if prompts.context:
            most = min(most, prompts.context - len(ids))
        for sample in range(config.answers.samples):
            key = (prompts.first + number, sample)
            if key not in done:
                rows.append((*key, Row(ids, seed_of(config.answers.seed, name, sample), most)))
    return sorted(rows, key=lambda entry: -len(entry[2].prompt))


def _rows(config: Config, target: Target, wanted: list[_Wanted], estimated: Estimate) -> int:
    """Answers side by side that fit the device, before the model is loaded.

    Raises MemoryPlanError.
    """
    own = weight_format.quantization_of(config, hf_config(config.model))
    kind = weight_format.weight_format_of(config, target.precision.resolved, own)
    if kind.name not in estimated.answers:
        raise ModelError(
            f"memory.precision_mode: the model resolves to {kind.name} here, in which its memory "
            "cannot be predicted; set another precision, as fp32"
        )
    return answers_plan.choose_rows(
        estimated.answers[kind.name],
        estimated.answers_batch,
        max(len(row.prompt) for _, _, row in wanted),
        max(row.most for _, _, row in wanted),
        target.device.type,
        available(target.device)[0],
        estimated.threshold,
        gpu.compute_capability(target.device),
    )


class _Job:
    """Samples the answers of a shard, batch by batch."""

    def __init__(
        self, config: Config, loaded: LoadedModel, prompts: _Prompts, partial: PartialAnswers
    ) -> None:
        self._config, self._loaded, self._partial = config, loaded, partial
        self._prompts = prompts
        self.alone, self.seconds = 0, 0.0
        model, answers = loaded.architecture.model, config.answers
        sampling = Sampling(answers.temperature, answers.top_p, answers.top_k)
        # 8-bit and 4-bit weights round to 16 bits inside
        precision = loaded.precision.resolved
        if loaded.quantization and precision == "fp32":
            precision = "bf16"
        self._generation = Generation(
            model, sampling, _ends(model), self._stops if answers.stop else None, precision
        )
        report_defaults(model)

    @cached_property
    def way(self) -> str:
        """How answers go side by side."""
        return self._generation.ways()

    @cached_property
    def _tokenizer(self) -> CorpusTokenizer:
        config: Any = self._config
        return CorpusTokenizer(config, describe_tokenizer(config.model))

    def _stops(self, prompt: Sequence[int], ids: Sequence[int]) -> bool:
        text, _ = self._tokenizer.decoded(prompt, ids)
        return any(stop in text for stop in self._config.answers.stop)

    def run(self, wanted: list[_Wanted], rows: int) -> None:
        """Sample all that is wanted, so many rows side by side. Raises MemoryPlanError,
        StoppedError.
        """
        rows = 1 if self.way == sampler.ONE_BY_ONE else rows
        log.info("%d answers side by side, %s", rows, self.way)
        total = len(wanted) + len(self._partial.found)
        progress = AnswersProgress(total, len(self._partial.found))
        started = time.perf_counter()
        failures = 0
        with StopRequest() as stop:
            while wanted and stop.requested is None:
                count = self._together(wanted, rows)
                batch = wanted[:count]
                error = self._sample(batch, progress)
                wanted = [entry for entry in wanted if not entry[2].ended]
                if error is None:
                    continue
                gpu.release(self._loaded.device)
                failures += rows == 1
                if failures == _LAST_ATTEMPTS:
                    raise MemoryPlanError(
                        f"memory ran out {failures} times with one answer at a time: {error}; "
                        f"{answers_plan.INSTEAD}"
                    )
                rows = max(1, rows // 2)
                log.warning("out of memory (%s): %d answers side by side from now on", error, rows)
        self.seconds = time.perf_counter() - started
        if wanted:
            raise StoppedError(
                f"stopped by {stop.requested} with {len(self._partial.found):,} of {total:,} "
                "answers on disk; run again to resume"
            )

    def _together(self, wanted: list[_Wanted], rows: int) -> int:
        """How many of the first answers go side by side."""
        if self.way != sampler.EQUAL_LENGTHS:
            return rows
        length = len(wanted[0][2].prompt)
        return sum(len(row.prompt) == length for _, _, row in wanted[:rows])

    def _sample(self, batch: list[_Wanted], progress: AnswersProgress) -> str | None:
        """Sample answers side by side; the error in one line where memory ran out."""
        keys = {id(row): (document, sample) for document, sample, row in batch}

        def ended(row: Row) -> None:
            reason = row.ended
            if reason == "length" and len(row.ids) < self._config.answers.max_new_tokens:
                reason = "context"
            numbers = (tuple(row.ids), tuple(row.log_probabilities))
            self._partial.add(Answer(*keys[id(row)], row.seed, reason, *numbers))
            self.alone += row.alone
            progress.update(len(self._partial.found), len(row.ids))

        rows = [row for _, _, row in batch]
        try:
            self._generation.answer(rows, ended, alone=self.way == sampler.ONE_BY_ONE)
        except (MemoryError, RuntimeError) as error:
            if not accelerator.is_out_of_memory(error):
                raise
            for row in rows:
                if not row.ended:
                    row.restart()
            return " ".join(str(error).split())[:200] or type(error).__name__
        return None


def _ends(model: Any) -> frozenset[int]:
    """The token ids that end a text, as the model's files say."""
    found = model.generation_config.eos_token_id
    if found is None:
        found = getattr(model.config.get_text_config(), "eos_token_id", None)
    ends = sampler.end_ids(found)
    if not ends:
        log.warning("the model names no token that ends a text: answers go on to their limit")
    return ends


def report_defaults(model: Any) -> None:
    """Warn of what a model's files ask of generation that answers do not follow.

    Args:
        model: Of transformers, with its `generation_config`.
    """
    plain = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_p": None, "typical_p": 1.0}
    asked = {n: getattr(model.generation_config, n, None) for n in plain}
    others = {n: v for n, v in asked.items() if v is not None and v != plain[n]}
    if others:
        log.warning(
            "generation_config.json asks for %s, which answers do not follow",
            ", ".join(f"{n}={v}" for n, v in others.items()),
        )
