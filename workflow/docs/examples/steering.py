"""A steering vector: the difference of two sets of texts, added to the residual stream.

    .venv/bin/python workflow/docs/examples/steering.py --texts texts.jsonl
    make run SET="name=steering corpus=text corpus.path=texts.jsonl corpus.id_column=id memory.activation_cache_filter=[blocks.15.hook_resid_post]"
    .venv/bin/python workflow/docs/examples/steering.py results/steering

The vector is the mean state of the joyful texts' last tokens minus that of the sad ones'. It is
tested on sentences that are in neither set: how much likelier it makes joyful words than sad ones.
"""  # noqa: E501

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import theloom
import torch
from theloom.config.schema import ModelConfig
from theloom.model.files import prepare_files
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

HOOK, BLOCK = "blocks.15.hook_resid_post", 15
SUBJECTS = (
    "I",
    "My sister",
    "The old man",
    "Everyone at the table",
    "Our neighbour",
    "The child",
    "My friend",
    "He",
)
JOY = ("felt happy and full of joy", "laughed with delight", "was thrilled by the wonderful news")
GRIEF = ("felt sad and full of sorrow", "wept with grief", "was crushed by the terrible news")
PROMPTS = (
    "When she opened the letter she felt",
    "Today has been",
    "After the journey they were",
    "The music made me",
)
WORDS = {
    "joy": (" happy", " wonderful", " delighted", " great"),
    "grief": (" sad", " terrible", " lonely", " awful"),
}


def write_texts(path: Path) -> None:
    """Write one text a line; the id of each names its set."""
    lines = [
        {"id": f"{name}-{s}-{v}", "text": f"{subject} {verb}"}
        for name, verbs in (("joy", JOY), ("grief", GRIEF))
        for s, subject in enumerate(SUBJECTS)
        for v, verb in enumerate(verbs)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def vector(run: Path) -> torch.Tensor:
    """Mean last state of the joyful texts minus that of the sad ones, (width,)."""
    acts = theloom.open(run / "activations.h5")
    last = {
        name: [acts.document(i)[HOOK][-1].float() for i in acts.documents if i.startswith(name)]
        for name in WORDS
    }
    return torch.stack(last["joy"]).mean(dim=0) - torch.stack(last["grief"]).mean(dim=0)


@contextmanager
def added(model: PreTrainedModel, direction: torch.Tensor) -> Iterator[None]:
    """The model with a vector added to the output of the block, at every position."""

    def add(module: torch.nn.Module, arguments: object, output: torch.Tensor) -> torch.Tensor:
        return output + direction

    handle = model.base_model.layers[BLOCK].register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def preference(model: PreTrainedModel, tokenizer: object) -> float:
    """How much likelier the joyful words are than the sad ones, in nats, over all prompts."""
    differences = []
    for prompt in PROMPTS:
        logits = model(torch.tensor([tokenizer.encode(prompt)])).logits[0, -1].log_softmax(dim=-1)
        joy, grief = (
            logits[[tokenizer.encode(w)[0] for w in WORDS[name]]].logsumexp(dim=0) for name in WORDS
        )
        differences.append(float(joy - grief))
    return sum(differences) / len(differences)


def main(run: Path, strength: float = 2.0) -> tuple[float, float, float]:
    """The preference steered away from joy, unsteered, and steered towards joy."""
    acts, direction = theloom.open(run / "activations.h5"), vector(run)
    files = prepare_files(ModelConfig(source=acts.attributes["model_source"]))
    model = AutoModelForCausalLM.from_pretrained(files.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(files.folder)
    results = []
    for factor in (-strength, 0.0, strength):
        with added(model, factor * direction):
            results.append(preference(model, tokenizer))
        print(f"{factor:+.1f} × vector: joyful words ahead of sad ones by {results[-1]:+.3f} nats")
    return results[0], results[1], results[2]


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--texts":
        write_texts(Path(sys.argv[2]))
    else:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "results/steering"))
