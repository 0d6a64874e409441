"""A linear probe for every captured layer: does the next token begin a new word?

It reads a run with several layers:

    make run SET="name=examples corpus.max_tokens=4096 memory.activation_cache_filter=[blocks.2.hook_resid_post,blocks.8.hook_resid_post,blocks.15.hook_resid_post,blocks.22.hook_resid_post,blocks.29.hook_resid_post]"
    .venv/bin/python workflow/docs/examples/probe.py results/examples

The control is the same probe on shuffled labels: its accuracy is chance.
"""  # noqa: E501

import sys
from pathlib import Path

import numpy as np
import theloom
import torch
from theloom.dataset.activations import Activations


def balanced(labels: np.ndarray, rows: np.ndarray, seed: int) -> np.ndarray:
    """Equally many rows of each label, so that chance is one half."""
    order = np.random.default_rng(seed).permutation(rows)
    yes, no = order[labels[order]], order[~labels[order]]
    count = min(len(yes), len(no))
    return np.sort(np.concatenate([yes[:count], no[:count]]))


def fit(states: torch.Tensor, labels: torch.Tensor) -> torch.nn.Linear:
    """Logistic regression on states (rows, width), with a little weight decay."""
    torch.manual_seed(0)
    probe = torch.nn.Linear(states.shape[1], 1)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        error = torch.nn.functional.binary_cross_entropy_with_logits(probe(states)[:, 0], labels)
        error = error + 1e-2 * probe.weight.square().sum()
        error.backward()
        return error

    optimizer.step(loss)
    return probe


def accuracy(probe: torch.nn.Linear, states: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of rows on the right side."""
    with torch.no_grad():
        return float(((probe(states)[:, 0] > 0) == (labels > 0.5)).float().mean())


def labelled(acts: Activations) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whether the next token begins a word, by row; and balanced rows to train on and to test.

    The last 30% of the rows are held out.
    """
    tokens = acts.to_dataframe("tokens")
    begins_word = tokens["token"].str.startswith(" ").to_numpy()
    same_document = (
        tokens["document"].to_numpy()[1:] == tokens["document"].to_numpy()[:-1]
    ).nonzero()[0]
    # the first position is unlike all others
    rows = same_document[tokens["position"].to_numpy()[same_document] > 0]
    labels = np.append(begins_word[1:], False)
    cut = int(0.7 * len(acts))
    train, test = (balanced(labels, part, seed=0) for part in (rows[rows < cut], rows[rows >= cut]))
    return labels, train, test


def main(run: Path) -> dict[str, tuple[float, float]]:
    """Accuracy and that of the control, by hook point."""
    acts = theloom.open(run / "activations.h5")
    labels, train, test = labelled(acts)
    truth = torch.from_numpy(labels).float()
    shuffled = truth[torch.randperm(len(truth), generator=torch.Generator().manual_seed(0))]
    results = {}
    for hook in acts.hooks:
        states, held_out = acts[hook][train].float(), acts[hook][test].float()
        mean, scale = states.mean(dim=0), states.std(dim=0) + 1e-6
        states, held_out = (states - mean) / scale, (held_out - mean) / scale
        results[hook] = tuple(
            accuracy(fit(states, y[train]), held_out, y[test]) for y in (truth, shuffled)
        )
        print("{:<28} accuracy {:.3f}   shuffled labels {:.3f}".format(hook, *results[hook]))
    return results


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "results/examples"))
