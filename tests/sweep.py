"""Every causal LM of transformers, made tiny: what TheLoom reads from it, against the model's own
hidden states.

`python tests/sweep.py` runs all and writes the table of workflow/docs/architectures.md; `python
tests/sweep.py NAME …` shows some. One import, and a fork for each model: what one breaks is not the
next one's.
"""

import logging
import os
import pickle
import re
import resource
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from theloom.errors import TheLoomError
from theloom.hooks.blocks import Architecture, find_blocks
from theloom.hooks.points import residual_points
from theloom.hooks.taps import Taps
from theloom.model.checks import SelfCheck, self_check
from theloom.model.forward import prefill
from theloom.precision import TOLERANCE
from tiny_configs import tiny_config
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SECONDS, BYTES = 120, 8 << 30
CHUNK = 5
NOT_TINY = "not made tiny"
DOCUMENT = Path(__file__).parents[1] / "workflow/docs/architectures.md"


@dataclass(frozen=True)
class Row:
    """One architecture: what the sweep found by itself, and what TheLoom said of it."""

    model_type: str
    model_class: str = ""
    blocks: str = ""
    problem: str = ""  # why it cannot be made tiny
    refusal: str = ""  # why TheLoom refuses it
    tried: SelfCheck | None = None
    states_error: float = float("nan")
    chunk_error: float = float("nan")
    shifted: bool = False  # its hidden states are the blocks' outputs

    @property
    def parity(self) -> bool:
        return self.states_error <= TOLERANCE["fp32"]

    @property
    def streams(self) -> bool:
        return (
            self.tried is not None and self.tried.streams and self.chunk_error <= TOLERANCE["fp32"]
        )

    @property
    def silently_wrong(self) -> bool:
        """Taken by TheLoom, though its rows are not the model's own, or streamed, though chunks
        change them.
        """
        streamed = self.tried is not None and self.tried.streams
        return self.tried is not None and (not self.parity or (streamed and not self.streams))


def build(model_type: str) -> PreTrainedModel:
    """A tiny model of an architecture, as a decoder, with weights scaled by 1/√fan-in: 0.02 would
    hide errors.
    """
    torch.manual_seed(0)
    config = tiny_config(model_type)
    if model_type.startswith("musicgen"):
        config = config.decoder  # its causal LM is made from this part alone
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    if type(config) in AutoModelForCausalLM._model_mapping:
        model = AutoModelForCausalLM.from_config(config)
    else:
        model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()


def examine(model_type: str) -> Row:
    """One architecture, from its config to its rows."""
    try:
        model = build(model_type)
    except Exception as error:
        return Row(model_type, problem=_words(error))
    name = type(model).__name__
    try:
        described = find_blocks(model)
        tried = self_check(described, TOLERANCE["fp32"])
    except TheLoomError as error:
        return Row(model_type, name, refusal=str(error))
    kind = type(described.blocks[0]).__name__
    ids = torch.randint(3, 128, (2, 23), generator=torch.Generator().manual_seed(1))
    whole = _read(described, ids, 23)
    shifted, states_error = _against_own_states(described, ids, whole)
    chunk_error = float("nan")
    if tried.streams:
        chunked = _read(described, ids, CHUNK)
        chunk_error = max(_error(chunked[name], value) for name, value in whole.items())
    return Row(model_type, name, kind, "", "", tried, states_error, chunk_error, shifted)


def _read(described: Architecture, ids: torch.Tensor, chunk_size: int) -> dict[str, torch.Tensor]:
    points = residual_points(len(described.blocks), described.hidden_size)
    seen: dict[str, list[torch.Tensor]] = {p.name: [] for p in points}
    with Taps(described, points, lambda name, value: seen[name].append(value.clone())) as taps:
        prefill(taps, ids, chunk_size)
    return {name: torch.cat(chunks, dim=1) for name, chunks in seen.items()}


def _against_own_states(
    described: Architecture, ids: torch.Tensor, found: dict[str, torch.Tensor]
) -> tuple[bool, float]:
    """Whether the model's own hidden states are its blocks' outputs, and the largest error against
    them.

    The last of them is after the final norm, in most models: then the model's own norm of the last
    output must be it.
    """
    count = len(described.blocks)
    with torch.inference_mode():
        states = described.model(
            input_ids=ids, use_cache=False, output_hidden_states=True
        ).hidden_states
    before = [found[f"blocks.{i}.hook_resid_pre"] for i in range(count)]
    after = [found[f"blocks.{i}.hook_resid_post"] for i in range(count)]
    joined = max((_error(a, b) for a, b in zip(after, before[1:], strict=False)), default=0.0)
    as_inputs = max(_error(a, b) for a, b in zip(before, states, strict=False))
    as_outputs = max((_error(a, b) for a, b in zip(after[:-1], states, strict=False)), default=0.0)
    end = min(_error(value, states[-1]) for value in [after[-1], *_normed(described, after[-1])])
    if _goes_on(described, ids, after[-1]):
        end = 0.0
    return as_outputs < as_inputs, max(joined, min(as_inputs, as_outputs), end)


def _normed(described: Architecture, value: torch.Tensor) -> Iterator[torch.Tensor]:
    """What each norm outside the blocks makes of a value."""
    inside = {m for block in described.blocks for m in block.modules()}
    for name, module in described.model.named_modules():
        if module not in inside and (
            "norm" in type(module).__name__.lower() or "norm" in name.rpartition(".")[2]
        ):
            try:
                with torch.inference_mode():
                    normed = module(value)
            except Exception:  # another width
                continue
            if isinstance(normed, torch.Tensor):
                yield normed


def _goes_on(described: Architecture, ids: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a module beyond the blocks that is no norm, but mixes several streams or outputs,
    takes a value.
    """
    inside = {m for block in described.blocks for m in block.modules()} | {described.model}
    seen = []

    def look(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        given = [
            v
            for a in (*args, *kwargs.values())
            for v in (a if isinstance(a, list | tuple) else [a])
        ]
        seen.extend(
            v
            for v in given
            if isinstance(v, torch.Tensor) and v.shape == value.shape and torch.equal(v, value)
        )

    mixers = [
        m
        for m in described.model.modules()
        if m not in inside and re.search("Residual|Mixer", type(m).__name__)
    ]
    handles = [m.register_forward_pre_hook(look, with_kwargs=True) for m in mixers]
    with torch.inference_mode():
        described.model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return bool(seen)


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max())


def sweep(model_types: Iterable[str]) -> Iterator[Row]:
    """The rows of these architectures."""
    for model_type in model_types:
        yield _in_a_fork(model_type)


def _in_a_fork(model_type: str) -> Row:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with os.fdopen(writing, "wb") as pipe:
            resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
            signal.alarm(SECONDS)
            try:
                row = examine(model_type)
            except BaseException as error:
                row = Row(
                    model_type,
                    problem=f"the sweep failed: {_words(error)}",
                    states_error=float("inf"),
                )
            pipe.write(pickle.dumps(row))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return (
        pickle.loads(said)
        if said
        else Row(model_type, problem=f"the sweep took more than {SECONDS} s or its memory")
    )


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def _say(row: Row) -> str:
    if row.problem:
        return f"{row.model_type}: {NOT_TINY}: {row.problem}"
    if row.refusal:
        return f"{row.model_type}: refused: {row.refusal}"
    wrong = " SILENTLY WRONG" if row.silently_wrong else ""
    errors = f"states {row.states_error:.1e} chunks {row.chunk_error:.1e}"
    return f"{row.model_type}: {errors} {row.tried}{wrong}"


def table(rows: list[Row]) -> str:
    """The page of the docs."""
    parity, streams = (sum(getattr(r, what) for r in rows) for what in ("parity", "streams"))
    tiny = sum(not r.problem for r in rows)
    shifted = ", ".join(f"`{r.model_type}`" for r in rows if r.shifted)
    return f"""# Architectures

`make sweep` builds a tiny model with random weights from the config of every architecture that `transformers`
{transformers.__version__} lists as a causal language model, runs it in FP32, and writes this page.

- Of {len(rows)} architectures {tiny} can be made tiny.
- In **{parity}**, `hook_resid_pre` and `hook_resid_post` of every block equal the model's own
  `output_hidden_states`, to at most {TOLERANCE["fp32"]:g} of the largest value.
  Its last entry is what the final norm, or what mixes several streams into one, makes of the last block's output.
- **{streams}** give the same rows in chunks of {CHUNK} tokens through their KV cache as in one pass.
- All others are refused with the reason that the table gives: as a whole, or for documents longer than a chunk.
- Taken, and wrong: {sum(r.silently_wrong for r in rows)}.

TheLoom finds out by itself: `load_model` tries every model so on a few tokens before it takes a row from it. Where a
model's own hidden states are the outputs of its blocks, not the inputs, they are compared as such:
{shifted}.

| architecture | class | residuals | in chunks | reason |
|---|---|---|---|---|
"""  # noqa: E501 + "".join(map(_line, rows))


def _line(row: Row) -> str:
    reason = row.problem or row.refusal or (row.tried.not_streamed if row.tried else "")
    if row.problem:
        return f"| `{row.model_type}` | | not made tiny | | {_cell(reason)} |\n"
    kept, streamed = (
        ("yes" if row.parity else "refused"),
        ("yes" if row.streams else "refused" if row.parity else ""),
    )
    return f"| `{row.model_type}` | {row.model_class} | {kept} | {streamed} | {_cell(reason)} |\n"


def _cell(words: str) -> str:
    return words.replace("|", "\\|").replace("<", "&lt;")[:160]


def main(requested: list[str]) -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = []
    for row in sweep(requested or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        rows.append(row)
        print(_say(row), flush=True)
    parity, streams = (sum(getattr(r, what) for r in rows) for what in ("parity", "streams"))
    print(
        f"{len(rows)} architectures: {parity} with the model's own hidden states, {streams} "
        "streamed"
    )
    wrong = [r.model_type for r in rows if r.silently_wrong]
    if not requested:
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(table(rows))
    if wrong:
        sys.exit(f"silently wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    main(sys.argv[1:])
