"""Every model of transformers, made tiny and sent through the stages of the pipeline: its rows
against plain transformers.

`python tests/sweep.py` tries all and writes the tables of workflow/docs/architectures.md; `python
tests/sweep.py NAME …` tries some again. Results are kept in results/architectures.json, so that a
sweep that was stopped resumes; remove the file to start anew. One import, and a fork for each
model: what one breaks is not the next one's.
"""

import copy
import json
import logging
import os
import random
import re
import resource
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from inspect import Parameter, signature
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import theloom
import torch
import transformers
from support import ROOT, Stages, stages
from sweep_page import CHUNK, LENGTHS, LIMIT, MAPPINGS, Row, page
from sweep_towers import (
    HALVES,
    READS,
    half_of,
    halves,
    plain_inputs,
    positions,
    resolutions,
    spread,
    stage_states,
    write_processor,
)
from theloom.engine import model_record
from theloom.errors import TheLoomError, VerificationError
from theloom.model.checkpoint.codes import codebooks
from tiny_configs import tiny_config
from tokenizers import Tokenizer, models, pre_tokenizers
from towers_support import write_media
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

SECONDS, BYTES = 300, 8 << 30
DOCUMENT = ROOT / "workflow/docs/architectures.md"
RESULTS = ROOT / "results/architectures.json"


def names(requested: Iterable[str] = ()) -> list[tuple[str, str, str]]:
    """Kind, model type and class of the architectures to try, each class once; base models where
    none with a head is tried, and those that compare two kinds as each of their halves.
    """
    found, seen = [], set()
    mappings = {**MAPPINGS, **halves()}
    mappings["base"] = mappings.pop("base")  # the last
    for kind, mapping in mappings.items():
        for model_type, classes in mapping.items():
            wanted = {model_type, f"{kind}/{model_type}"}
            model_class: Any = (
                classes[0] if kind == "base" and not isinstance(classes, str) else classes
            )
            if kind == "base" and model_type in {known for known, *_ in seen}:
                continue
            once = (model_type, model_class, kind if kind in HALVES else "")
            if isinstance(model_class, str) and once not in seen:
                seen.add(once)
                if not requested or wanted.intersection(requested):
                    found.append((kind, model_type, model_class))
    return found


def build(model_type: str, kind: str = "causal") -> PreTrainedModel:
    """A tiny model of an architecture, with weights scaled by 1/√fan-in: 0.02 would hide errors.

    A causal language model is made as a decoder.
    """
    torch.manual_seed(0)
    config = tiny_config(model_type)
    model_class = _class_of(kind, model_type)
    if kind == "causal":
        if model_type.startswith("musicgen"):
            config = config.decoder  # its causal LM is made from this part alone
        if hasattr(config, "is_decoder"):
            config.is_decoder = True
    if kind == "causal" and type(config) in AutoModelForCausalLM._model_mapping:
        model = AutoModelForCausalLM.from_config(config)
    else:
        model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                inputs = parameter[0].numel() if parameter.ndim == 4 else parameter.shape[-1]
                parameter.normal_(std=inputs**-0.5)
    spread(model.eval())
    return model


def _class_of(kind: str, model_type: str) -> type[PreTrainedModel]:
    name = (MAPPINGS | halves())[kind][model_type]
    found: type[PreTrainedModel] = getattr(transformers, name if isinstance(name, str) else name[0])
    return found


def takes_instead(model_class: type[PreTrainedModel]) -> str:
    """What a model must be given where it takes no token ids; empty where it takes them."""
    names = [name for name in signature(model_class.forward).parameters if name != "self"]
    if "grid_thw" in names:
        return "pixel_values"
    return "" if "input_ids" in names else next(iter(names), "nothing")


def examine(kind: str, model_type: str, model_class: str, folder: Path) -> Row:
    """One architecture, from its config to its rows; in chunks where the model can be streamed."""
    row = Row(kind, model_type, model_class, "untried")
    try:
        other = takes_instead(_class_of(kind, model_type))
        reads = HALVES[kind][0] if kind in HALVES else READS.get(other, "text")
        if kind not in HALVES and other and other not in READS:
            return replace(row, status="other", reason=f"it takes {other}")
        model = build(model_type, kind)
        model.save_pretrained(folder / "model")
        model = type(model).from_pretrained(folder / "model").eval()
        if kind in HALVES:
            model = half_of(model, kind)
        if reads == "audio" and not getattr(model.config, "num_hidden_layers", None):
            model = getattr(model, "encoder", model)  # behind it are the blocks of its head
        if reads != "text":
            write_processor(model, model_type, reads, folder / "model")
    except Exception as error:
        return replace(row, reason=_words(error))
    if reads != "text":
        row = replace(row, model_class=type(model).__name__)
        return _run_tower(row, model, folder, reads)
    _write_tokenizer(folder / "tokenizer")
    _write_documents(folder / "texts.jsonl")
    row = replace(row, model_class=type(model).__name__)
    return (_run_halves if _has_halves(model) else _run)(row, model, folder / "run")


def _has_halves(model: PreTrainedModel) -> bool:
    """Whether a model is an encoder-decoder that takes texts on both sides."""
    takes = signature(model.forward).parameters
    return bool(model.config.is_encoder_decoder) and "decoder_input_ids" in takes


def _run_halves(row: Row, model: PreTrainedModel, folder: Path) -> Row:
    """A run of the encoder and one of the decoder: right where both are."""
    worst = row
    for side in ("encoder", "decoder"):
        found = _run(row, model, folder / side, side)
        if found.status != "right":
            return replace(found, reason=f"{side}: {found.reason}")
        if found.error > worst.error:
            worst = found
    return replace(worst, streams=False, not_streamed="an encoder-decoder goes in one pass")


def _run(row: Row, model: PreTrainedModel, folder: Path, side: str = "") -> Row:
    """All stages, and every document's rows against the model; of one side where it has two."""
    place = folder.parent.parent if side else folder.parent
    corpus = f"corpus.path={place}/texts.jsonl model.tokenizer={place}/tokenizer"
    if count := codebooks(model.config):
        _write_codes(place / "codes.jsonl", count, model.config.vocab_size)
        corpus = f"corpus.path={place}/codes.jsonl corpus.input_ids=codes"
    requested = (
        f"corpus=text {corpus} memory.streaming_chunk_size={CHUNK} "
        f"corpus.context_length={max(LENGTHS) + (1 if side else 0)} extraction.batch_tokens=128 "
        "extraction.shards=1"
    )
    if side:
        ends = ",".join(f"{side}.blocks.*.hook_resid_{end}" for end in ("pre", "post"))
        requested += f" memory.activation_cache_filter=[{ends}]"
    if side == "decoder":
        requested += " corpus.target=target"
    run = stages(folder, place / "model", requested)
    return _finish(row, run, place, lambda: _compare(_read_alone(model), run.activations, side))


def _read_alone(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that a run over texts reads: its text half, where the whole takes none
    without an image.
    """
    images = signature(model.forward).parameters.get("pixel_values")
    needed = images is not None and images.default is Parameter.empty
    return half_of(model, "text-half") if needed else model


def _run_tower(row: Row, model: PreTrainedModel, place: Path, reads: str) -> Row:
    """All stages over images or clips, and every document's rows against the model; of the encoder
    where there is a decoder, too; of one in stages, a run for each number of rows.
    """
    files = sorted(write_media(place / reads, reads).iterdir())
    side = "encoder." if model.config.is_encoder_decoder else ""
    ends = ",".join(f"{side}blocks.*.hook_resid_{end}" for end in ("pre", "post"))
    requested = (
        f"corpus={reads} corpus.path={place / reads} corpus.max_tokens=null "
        f"memory.activation_cache_filter=[{ends}]"
    )
    run = stages(place / "run", place / "model", requested)

    def compare() -> tuple[bool, float]:
        acts, shifted, worst = theloom.open(run.activations), False, 0.0
        plain = model.get_encoder() if side else model
        for number, file in enumerate(files):
            document = acts.document(number)
            rows = {n.removeprefix(side): document[n][None].float() for n in acts.hooks}
            inputs = plain_inputs(plain, file, place / "model", reads)
            outputs, error = _against_own_states(plain, inputs, rows, "")
            shifted, worst = shifted or outputs, max(worst, error)
        return shifted, worst

    found = _finish(row, run, place, compare)
    in_stages = ("in stages", "by stages", "is not one row for each of")
    if found.status == "refused" and any(words in found.reason for words in in_stages):
        return _run_stages(row, model, place, files) or found
    return found


def _run_stages(row: Row, model: PreTrainedModel, place: Path, files: list[Path]) -> Row | None:
    """A run over images for each number of rows that a model's stages have: right where all are.
    None where plain transformers cannot run the model on an image.
    """
    try:
        every = [plain_inputs(model, file, place / "model", "images") for file in files]
    except ValueError as error:
        return replace(row, status="untried", reason=f"its processor: {_words(error)}")
    try:
        groups = resolutions(model, every[0])
    except Exception:  # of the model's own code
        return None
    worst, missing = row, []
    for numbers in groups:
        found = row
        while numbers:
            hooks = ",".join(f"stages.{n}.hook_out" for n in numbers)
            run = stages(
                place / f"run{numbers[0]}",
                place / "model",
                f"corpus=images corpus.path={place / 'images'} corpus.max_tokens=null "
                f"extraction.shards=1 memory.activation_cache_filter=[{hooks}]",
            )
            found = _finish(row, run, place, partial(_compare_stages, model, run, every))
            absent = re.search(r"'stages\.(\d+)\..*is no module's output", found.reason)
            if absent is None:
                break
            missing.append(int(absent[1]))
            numbers.remove(missing[-1])
        if found.status != "right" and numbers:
            return replace(found, reason=f"stages {numbers}: {found.reason}")
        worst = max(worst, found, key=lambda r: r.error)
    without = f"; entries {missing} are no module's output" if missing else ""
    return replace(worst, not_streamed=f"stages: {worst.not_streamed}{without}")


def _compare_stages(
    model: PreTrainedModel, run: Stages, inputs: list[dict[str, Any]]
) -> tuple[bool, float]:
    """The largest error of any document's rows against the model's own hidden states."""
    acts, worst = theloom.open(run.activations), 0.0
    for number, given in enumerate(inputs):
        document = acts.document(number)
        states = stage_states(model, given)
        for hook in acts.hooks:
            expected = positions(model, states[int(hook.split(".")[1])])
            worst = max(worst, _error(document[hook].float(), expected))
    return False, worst


def _finish(row: Row, run: Stages, place: Path, compare: Callable[[], tuple[bool, float]]) -> Row:
    """Run the stages and the comparison, and say what came of them."""
    try:
        run.all().verify()
        shifted, error = compare()
    except VerificationError as error:
        return replace(row, status="wrong", reason=_words(error))
    except TheLoomError as error:
        one_line = "\n" not in str(error)
        reason = str(error).replace(f"{place}/", "")
        return replace(row, status="refused" if one_line else "wrong", reason=reason)
    except Exception as error:
        if "Cannot allocate memory" in str(error):  # the sweep's own limit
            return replace(row, status="untried", reason=_words(error))
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "theloom" in f.filename]
        where = ", ".join(f"{Path(f.filename).name}:{f.lineno}" for f in ours[-3:])
        return replace(row, status="traceback", reason=f"{_words(error)} @ {where}")
    record = model_record.read(run.folder / "model.h5")
    return replace(
        row,
        status="right" if error <= LIMIT else "wrong",
        error=error,
        streams=record.streams,
        not_streamed=str(record.attributes["not_streamed"]),
        shifted=shifted,
    )


def _write_tokenizer(folder: Path) -> None:
    """One whose tokens are the numbers from 0 to 127 as words."""
    words = Tokenizer(models.WordLevel({str(n): n for n in range(128)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def _write_documents(file: Path) -> None:
    """Documents of all lengths, in no order, with targets of all lengths in another order."""
    chance = random.Random(0)
    lengths, targets = list(LENGTHS), list(LENGTHS)
    chance.shuffle(lengths)
    texts = [_words_of(chance, length) for length in lengths]
    chance.shuffle(targets)
    with file.open("w") as out:
        for text, length in zip(texts, targets, strict=True):
            pair = {"text": text, "target": _words_of(chance, length)}
            out.write(json.dumps(pair) + "\n")


def _write_codes(file: Path, count: int, last: int) -> None:
    """Documents of codes of all lengths, in no order; the last is that of padding."""
    chance = random.Random(0)
    lengths = list(LENGTHS)
    chance.shuffle(lengths)
    with file.open("w") as out:
        for length in lengths:
            codes = [[chance.randint(0, last) for _ in range(length)] for _ in range(count)]
            out.write(json.dumps({"codes": codes}) + "\n")


def _words_of(chance: random.Random, count: int) -> str:
    return " ".join(str(chance.randint(3, 127)) for _ in range(count))


def _compare(model: PreTrainedModel, activations: Path, side: str = "") -> tuple[bool, float]:
    """Whether the model's hidden states are its blocks' outputs, and the largest error of any
    document against the model on that document alone.
    """
    acts = theloom.open(activations)
    found = {name.removeprefix(f"{side}."): acts[name] for name in acts.hooks}
    if side == "encoder" and _writes_codes(model):
        model, side = model.get_encoder(), ""  # by itself: its decoder takes no ids
    sources = acts.columns["source_ids"].tolist() if side == "decoder" else []
    starts, shifted, worst = acts.window_offset.tolist(), False, 0.0
    for number, (begin, end) in enumerate(pairwise(starts)):
        ids = torch.from_numpy(acts.input_ids.numpy(slice(begin, end)).astype("i8"))[None]
        rows = {name: values[begin:end][None].float() for name, values in found.items()}
        if ids.ndim == 3:  # of codes, which transformers takes by codebook
            ids = ids.transpose(1, 2).flatten(0, 1)
        inputs = {"input_ids": ids, **_no_cache(model)}
        if side == "encoder":
            inputs["decoder_input_ids"] = torch.tensor([[3]])
        if side == "decoder":
            inputs |= {"input_ids": torch.tensor([sources[number]]), "decoder_input_ids": ids}
        outputs, error = _against_own_states(_fresh(model), inputs, rows, side)
        shifted, worst = shifted or outputs, max(worst, error)
    return shifted, worst


def _fresh(model: PreTrainedModel) -> PreTrainedModel:
    """The model as it is before its first pass, from which Reformer keeps its number of buckets."""
    keeps = any(hasattr(module, "num_buckets") for module in model.modules())
    return copy.deepcopy(model) if keeps else model


def _writes_codes(model: PreTrainedModel) -> bool:
    """Whether a decoder behind an encoder takes several codes a position, as of sound."""
    return getattr(getattr(model.config, "decoder_config", None), "num_channels", 1) > 1


def _against_own_states(
    model: PreTrainedModel, inputs: dict[str, Any], found: dict[str, torch.Tensor], side: str
) -> tuple[bool, float]:
    """Whether the model's own hidden states are its blocks' outputs, and the largest error against
    them.

    The last of them is after the final norm, in most models: then the model's own norm of the last
    output must be it.
    """
    count = len(found) // 2
    with torch.inference_mode():
        output = model(output_hidden_states=True, **inputs)
    names = ("hidden_states", "decoder_hidden_states", "language_model_hidden_states")
    states = next(
        s
        for name in ([f"{side}_hidden_states"] if side else names)
        if (s := getattr(output, name, None)) is not None
    )
    states = [state[None] if state.ndim == 2 else state for state in states]  # a list of patches
    if hasattr(type(getattr(model, "base_model", model)), "_pad_to_mult_of_chunk_length"):
        states = [state[:, : inputs["input_ids"].shape[1]] for state in states]  # padded within
    if hasattr(model.config, "altup_num_inputs"):  # its streams are the first axis
        states = [state.movedim(0, 2) if state.ndim == 4 else state for state in states]
    before = [found[f"blocks.{i}.hook_resid_pre"] for i in range(count)]
    after = [found[f"blocks.{i}.hook_resid_post"] for i in range(count)]
    if len(states) < count:
        return False, float("inf")
    joined = max((_error(a, b) for a, b in zip(after, before[1:], strict=False)), default=0.0)
    as_inputs = max(_error(a, b) for a, b in zip(before, states, strict=False))
    if joined > LIMIT and len(states) == count + 1:  # blocks run in cycles: these are outputs
        given, kept = _inputs_of_blocks(model, inputs), [before[0], *after[:-1]]
        joined = max(_error(a, b) for a, b in zip(before, given, strict=True))
        as_inputs = max(_error(a, b) for a, b in zip(kept, states[:-1], strict=True))
    as_outputs = max((_error(a, b) for a, b in zip(after[:-1], states, strict=False)), default=0.0)
    normed = [n for value in (after[-1], *_pooled(model, after[-1])) for n in _normed(model, value)]
    ends = [after[-1], *normed, *(p for value in normed for p in _projected(model, value))]
    end = min(_error(value, states[-1]) for value in ends)
    merged = states[-1].shape[:-1] != after[-1].shape[:-1]  # patches become fewer behind the norm
    if end > LIMIT and _goes_on(
        model, inputs, after[-1], "Residual|Mixer|Hyper" + "|Norm" * merged
    ):
        end = 0.0
    return as_outputs < as_inputs, max(joined, min(as_inputs, as_outputs), end)


def _inputs_of_blocks(model: PreTrainedModel, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """What the modules that transformers declares as blocks are given, call by call."""
    declared = model.base_model._can_record_outputs["hidden_states"]
    seen: list[torch.Tensor] = []
    blocks = [m for m in model.modules() if isinstance(m, declared)]
    handles = [m.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for m in blocks]
    with torch.inference_mode():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


def _no_cache(model: PreTrainedModel) -> dict[str, bool]:
    """One pass, where the model can be told: the first pass into xLSTM's cache fails."""
    return {"use_cache": False} if "use_cache" in signature(model.forward).parameters else {}


def _normed(model: PreTrainedModel, value: torch.Tensor) -> Iterator[torch.Tensor]:
    """What each norm of a model makes of a value."""
    for name, module in model.named_modules():
        if "norm" in type(module).__name__.lower() or "norm" in name.rpartition(".")[2]:
            try:
                with torch.inference_mode():
                    normed = module(value)
            except Exception:  # another width
                continue
            if isinstance(normed, torch.Tensor):
                yield normed


def _pooled(model: PreTrainedModel, value: torch.Tensor) -> Iterator[torch.Tensor]:
    """What a pooling of positions, as of an audio encoder's last block, makes of a value."""
    for module in model.modules():
        if isinstance(module, torch.nn.AvgPool1d) and value.shape[1] > 1:
            yield module(value.transpose(1, 2)).transpose(1, 2)


def _projected(model: PreTrainedModel, value: torch.Tensor) -> Iterator[torch.Tensor]:
    """What each linear of a model outside of its blocks makes of a value."""
    for name, module in model.named_modules():
        outside = isinstance(module, torch.nn.Linear) and not re.search(r"\.\d+\.", name)
        if outside and module.in_features == value.shape[-1]:
            with torch.inference_mode():
                yield module(value)


def _goes_on(
    model: PreTrainedModel, inputs: dict[str, Any], value: torch.Tensor, kinds: str
) -> bool:
    """Whether a module of these kinds, such as those that mix several streams, takes a value."""
    seen = []

    def look(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        given = [
            v
            for a in (*args, *kwargs.values())
            for v in (a if isinstance(a, list | tuple) else [a])
        ]
        tensors = [v for v in given if isinstance(v, torch.Tensor)]
        as_rows = [v[None] if v.ndim == value.ndim - 1 else v for v in tensors]
        seen.extend(v for v in as_rows if _error(v, value) <= LIMIT)

    mixers = [m for m in model.modules() if re.search(kinds, type(m).__name__)]
    handles = [m.register_forward_pre_hook(look, with_kwargs=True) for m in mixers]
    with torch.inference_mode():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return bool(seen)


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max())


def sweep(requested: Iterable[tuple[str, str, str]]) -> Iterator[Row]:
    """The rows of these architectures (`names`)."""
    for architecture in requested:
        yield _in_a_fork(*architecture)


def _in_a_fork(kind: str, model_type: str, model_class: str) -> Row:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with os.fdopen(writing, "w") as pipe, tempfile.TemporaryDirectory() as folder:
            resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            try:
                row = examine(kind, model_type, model_class, Path(folder))
            except BaseException as error:
                reason = f"the sweep failed: {_words(error)}"
                row = Row(kind, model_type, model_class, "traceback", reason)
            pipe.write(json.dumps(asdict(row)))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        reported = pipe.read()
    os.waitpid(child, 0)
    if reported:
        return Row(**json.loads(reported))
    reason = f"it took more than {SECONDS} s of one core or {BYTES >> 30} GiB"
    return Row(kind, model_type, model_class, "traceback", reason)


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


QUIET = ("right", "refused", "untried", "other")


def _report(row: Row) -> str:
    error = f" {row.error:.1e}" if row.error >= 0 else ""
    status = row.status if row.status in QUIET else row.status.upper()
    return f"{row.name}: {status}{error} {row.reason or row.not_streamed}"


def main(requested: list[str]) -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    there = {}
    if RESULTS.exists():
        there = {k: Row(**v) for k, v in json.loads(RESULTS.read_text()).items()}
    wanted = [n for n in names(requested) if requested or f"{n[0]}/{n[1]}" not in there]
    for number, row in enumerate(sweep(wanted), 1):
        there[row.name] = row
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({k: asdict(v) for k, v in there.items()}, indent=1))
        print(f"{number}/{len(wanted)} {_report(row)}", flush=True)
    print(Counter(row.status for row in there.values()))
    every = [Row(*name, "pending") for name in names()]
    DOCUMENT.write_text(page([there.get(row.name, row) for row in every]))
    if wrong := [r.name for r in there.values() if r.status in ("wrong", "traceback")]:
        sys.exit(f"wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    main(sys.argv[1:])
