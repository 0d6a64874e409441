"""A small sparse autoencoder, trained on shuffled batches of one layer's rows.

    make run SET="corpus.max_tokens=16384"
    .venv/bin/python workflow/docs/examples/sparse_autoencoder.py results/smollm2-135m

Each row becomes a sum of 32 of 1,024 learned directions. Training minimizes what is left over, as
a share of the rows' variance: the fraction of variance unexplained.
"""

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import theloom
import torch
from theloom.dataset.activations import Activations

FEATURES, ACTIVE, BATCH = 1024, 32, 256


class SparseAutoencoder(torch.nn.Module):
    """Encodes a row as its `ACTIVE` largest features, and decodes their sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = torch.nn.Linear(width, FEATURES)
        self.decoder = torch.nn.Linear(FEATURES, width)
        with torch.no_grad():  # begin with each feature reading the direction that it writes
            self.decoder.weight.copy_(torch.nn.functional.normalize(self.encoder.weight.T, dim=0))
            self.encoder.weight.copy_(self.decoder.weight.T)

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # (batch, width)
        features = self.encoder(rows - self.decoder.bias).relu()
        values, indices = features.topk(ACTIVE, dim=-1)
        sparse = torch.zeros_like(features).scatter(-1, indices, values)
        return self.decoder(sparse), sparse


def batches(acts: Activations, hook: str, end: int, epochs: int) -> Iterator[torch.Tensor]:
    """Rows before `end`, in another order each epoch, without those of first positions.

    The massive activations there would make up all of the variance.
    """
    for epoch in range(epochs):
        for batch in acts.batches(
            [hook, "position", "row"], BATCH, shuffle=True, seed=epoch, drop_last=True
        ):
            yield batch[hook][(batch["position"] > 0) & (batch["row"] < end)].float()


def unexplained(model: SparseAutoencoder, rows: torch.Tensor) -> float:
    """The fraction of variance unexplained."""
    with torch.no_grad():
        left = (model(rows)[0] - rows).square().sum()
    return float(left / (rows - rows.mean(dim=0)).square().sum())


def train(
    acts: Activations, hook: str, truth: Activations, epochs: int = 12
) -> tuple[float, float]:
    """The fraction of variance unexplained of held-out rows of `truth`, before and after training
    on the other rows of `acts`, which may be the same.
    """
    end = int(0.9 * len(acts))
    sample = torch.cat(list(islice(batches(acts, hook, end, epochs=1), 8)))
    mean, scale = sample.mean(dim=0), sample.std()
    held_out = end + (acts.position.numpy(slice(end, None)) > 0).nonzero()[0]
    test = (truth[hook][held_out].float() - mean) / scale
    model = SparseAutoencoder(sample.shape[1])
    before = unexplained(model, test)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step, batch in enumerate(batches(acts, hook, end, epochs)):
        batch = (batch - mean) / scale
        loss = (model(batch)[0] - batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.4f}")
    return before, unexplained(model, test)


def main(run: Path, epochs: int = 12) -> tuple[float, float]:
    """The fraction of variance unexplained of rows held out, before and after training."""
    acts = theloom.open(run / "activations.h5")
    hook = acts.hooks[len(acts.hooks) // 2]
    before, after = train(acts, hook, acts, epochs)
    print(f"{hook}: variance unexplained, held-out rows: {before:.3f} before, {after:.3f} after")
    return before, after


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "results/smollm2-135m"))
