"""At which layer do a model's own answers of two kinds differ? A difference of means.

    make run SET="name=answers corpus=text corpus.path=config/corpus/questions.jsonl corpus.id_column=id corpus.messages=chat corpus.columns=[kind] answers.source=model answers.max_new_tokens=16 answers.temperature=0.7 rows.keep=generated rows.pool=mean memory.activation_cache_filter=[hook_embed,blocks.*.hook_resid_post]"
    .venv/bin/python workflow/docs/examples/answers.py results/answers

Sixty prompts ask SmolLM2 to praise or to complain about thirty subjects. It answers them itself, and
the mean state of each answer's tokens is stored. The direction from complaints to praise is fitted
on the answers to half of the subjects, and tells the kinds of the other half's; the control is
fitted on shuffled kinds. Writes answers.svg into the run's folder.
"""  # noqa: E501

import sys
from pathlib import Path

import numpy as np
import theloom
from matplotlib.figure import Figure

KINDS = ("complaint", "praise")
SHUFFLES = 20


def accuracy(rows: np.ndarray, kind: np.ndarray, fitted: np.ndarray) -> float:
    """Share of the answers that were not fitted and lie on the right side of the midpoint.

    Args:
        rows: (answers, width).
        kind: 1 for praise, 0 for complaints, (answers).
        fitted: the answers that the means are of, boolean, (answers).
    """
    means = [rows[fitted & (kind == n)].mean(axis=0) for n in range(2)]
    direction = means[1] - means[0]
    side = (rows[~fitted] - (means[0] + means[1]) / 2) @ direction > 0
    return float((side == kind[~fitted]).mean())


def main(run: Path) -> dict[str, tuple[float, float]]:
    """By hook point, the accuracy on the answers left out, and that with shuffled kinds."""
    acts = theloom.open(run / "activations.h5")
    kind = np.array([KINDS.index(name) for name in acts.rows["kind"]])
    subject = np.array([int(name.split("-")[0]) for name in acts.rows["answer_prompt"]])
    fitted = subject % 2 == 0
    random = np.random.default_rng(0)
    shuffled = [random.permutation(kind) for _ in range(SHUFFLES)]
    found = {}
    for hook in acts.hooks:
        rows = acts[hook][:].double().numpy()
        control = np.mean([accuracy(rows, other, fitted) for other in shuffled])
        found[hook] = (accuracy(rows, kind, fitted), float(control))
        print(f"{hook}: {found[hook][0]:.3f}, with shuffled kinds {control:.3f}")
    draw(found, run / "answers.svg")
    return found


def draw(found: dict[str, tuple[float, float]], path: Path) -> None:
    """Draw both accuracies by hook point."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    panel = figure.subplots()
    for values, label, line in zip(
        zip(*found.values(), strict=True),
        ("kind of the answer", "shuffled kinds"),
        ("-o", "--s"),
        strict=True,
    ):
        panel.plot(values, line, label=label)
    panel.set_xticks(range(len(found)), list(found), rotation=90, fontsize=7)
    panel.set_ylabel("accuracy on other subjects' answers")
    panel.set_ylim(0, 1.02)
    panel.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "results/answers"))
