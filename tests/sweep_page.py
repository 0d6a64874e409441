"""The page that the sweep writes: a table of architectures, and what is refused by its use."""

import json
from collections import Counter
from dataclasses import dataclass
from importlib.resources import files

import transformers
from theloom.precision import TOLERANCE
from transformers.models.auto import modeling_auto

MAPPINGS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "image-text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "encoder-decoder": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "base": modeling_auto.MODEL_MAPPING_NAMES,  # those that none above has
}
TITLES = {
    "causal": "Causal language models",
    "image-text": "Models of images and text, on text alone",
    "masked": "Masked language models",
    "encoder-decoder": "Encoder-decoders",
    "image-half": "Models that compare images to texts: the half of images",
    "audio-half": "Models that compare audio to texts: the half of audio",
    "text-half": "Models that compare texts to images or audio: the half of texts",
    "base": "Further base models",
}
# tokens of documents: one, two, and round the switches of tiny configs (8, 16, 24), in one pass and
# in chunks
LENGTHS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 19, 20, 21, 24, 25, 33, 40, 41)
CHUNK = 20
LIMIT = 10 * TOLERANCE["fp32"]  # batches and chunks sum in another order than one document alone


@dataclass(frozen=True)
class Row:
    """One architecture, and what came of its run.

    `status` is right, refused, wrong, traceback, untried (it cannot be made tiny), other (it takes
    neither token ids, pixels nor sound) or pending.
    """

    kind: str
    model_type: str
    model_class: str
    status: str
    reason: str = ""
    error: float = -1.0  # of the rows, as a share of the largest value; -1: there are none
    streams: bool = False
    not_streamed: str = ""  # the reason
    shifted: bool = False  # its hidden states are the blocks' outputs

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.model_type}"


def page(rows: list[Row]) -> str:
    """The page of the docs."""
    count = Counter(row.status for row in rows)
    types = Counter(_by_type(rows).values())
    shifted = ", ".join(f"`{r.model_type}`" for r in rows if r.shifted) or "none"
    pending = f"; {types['pending']} were not run" if types["pending"] else ""
    head = f"""# Architectures

`make sweep` builds a tiny model with random weights from the config of every model type of `transformers`
{transformers.__version__}: those of `MODEL_MAPPING`, with a head where it lists one for text. It saves each as a
checkpoint and runs the stages `estimate_memory`, `load_model`, `tokenize_corpus`, `extract_activations`,
`merge_shards` and `verify` on it, in FP32. Documents have {LENGTHS[0]} to {LENGTHS[-1]} tokens, in batches with others and in chunks of
{CHUNK} tokens; sliding windows are of 8. Then all rows of every document are compared with plain `transformers`
on that document alone. An encoder-decoder has a run of its encoder, and one of its decoder over pairs of texts; both
must be right. A model of images or audio reads five images or clips of several sizes, by the processor that
`transformers` names for it; by ViT's in the place of DINOv3's, which needs torchvision, and of GLPN's, whose images
are of several sizes.

Of the {sum(types.values())} types of `MODEL_MAPPING`, **{types["right"]}** are taken in at least one of their classes, with the rows of plain
`transformers`. {types["refused"]} are refused; {types["other"]} take other inputs than token ids, pixels or sound, such as series; {types["untried"]} cannot be made tiny
here, many for want of a package (timm, torchvision, torchaudio){pending}.
Taken, and wrong: {types["wrong"]}.

The tables have {len(rows)} rows, one for each class:

- **{count["right"]}** are right: `hook_resid_pre` and `hook_resid_post` of every block, or `hook_out` of every stage, equal its own
  `output_hidden_states`, to at most {LIMIT:g} of the largest value. The last entry is what the final norm, a projection
  behind it, or what mixes several streams into one, makes of the last block's output.
- **{sum(r.streams for r in rows)}** of these give the same rows in chunks, through their KV cache. With the others a
  document longer than a chunk goes in one pass, for the reason in the table.
- {count["refused"]} are refused, with one line.
- Taken, and wrong: {count["wrong"]}. Ended in a traceback: {count["traceback"]}.

`load_model` tries every model on a few tokens before a row is taken from it. Where a model's own hidden states are the
outputs of its blocks, not the inputs, they are compared as such: {shifted}.
"""  # noqa: E501
    tables = [_table(kind, [r for r in rows if r.kind == kind]) for kind in TITLES]
    return head + _refused_by_use(rows) + "".join(tables)


BEST_FIRST = ("wrong", "traceback", "right", "refused", "untried", "other", "pending")


def _by_type(rows: list[Row]) -> dict[str, str]:
    """The status of each type of `MODEL_MAPPING`: of its classes the one that is taken, if any."""
    found: dict[str, str] = {}
    for row in sorted(rows, key=lambda r: BEST_FIRST.index(r.status)):
        if row.model_type in modeling_auto.MODEL_MAPPING_NAMES:
            found.setdefault(row.model_type, row.status)
    return found


def _refused_by_use(rows: list[Row]) -> str:
    """The refused classes whose downloads are known."""
    listed = files("transformer_lens").joinpath("tools/model_registry/data/architecture_gaps.json")
    gaps = json.loads(listed.read_text())
    downloads = {g["architecture_id"]: g["total_downloads"] for g in gaps["gaps"]}
    refused = [r.model_class for r in rows if r.status == "refused"]
    known = {name: downloads[name] for name in refused if name in downloads}
    if not known:
        return ""
    ranked = sorted(known.items(), key=lambda entry: -entry[1])
    lines = "".join(f"| {name} | {count:,} |\n" for name, count in ranked)
    return f"""
## Refused, by use

Downloads of the hub's models of text by class, as the registry in the package `transformer-lens` had them on
{gaps["generated_at"]}. It has models of text generation that it does not support itself, with 500 downloads or more:
of the other refused classes their use is not known here, and they stand in the order of `transformers`.

| refused class | downloads |
|---|---|
{lines}"""  # noqa: E501


def _table(kind: str, rows: list[Row]) -> str:
    head = "| architecture | class | residuals | in chunks | reason |\n|---|---|---|---|---|\n"
    return f"\n## {TITLES[kind]}\n\n{head}" + "".join(map(_line, rows))


def _line(row: Row) -> str:
    words = {
        "right": "yes",
        "untried": "not made tiny",
        "pending": "not run",
        "other": "other inputs",
    }
    status = words.get(row.status, row.status)
    streamed = ("yes" if row.streams else "one pass") if row.status == "right" else ""
    reason = (row.reason or row.not_streamed).replace("|", "\\|").replace("<", "&lt;")[:160]
    return f"| `{row.model_type}` | {row.model_class} | {status} | {streamed} | {reason} |\n"
