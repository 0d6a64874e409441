"""A sparse autoencoder by SAELens, and one by dictionary_learning, trained on stored rows.

Their requirements differ from TheLoom's, so each goes into an environment of its own, next to
TheLoom. That of SAELens is `.venv-peers`, which `make bench` makes too. dictionary-learning asks
for older packages than TheLoom has: install it, and the nnsight that it imports, with --no-deps.

    make run SET="corpus.max_tokens=16384"
    python3 -m venv .venv-peers && .venv-peers/bin/pip install --editable . sae-lens
    .venv-peers/bin/python workflow/docs/examples/train_sae.py results/smollm2-135m saelens

Rows of first positions, whose massive activations would make up all of the variance, are left out.
The factor that scales rows is exact over all others; both libraries estimate it from some batches.
"""

import sys
from pathlib import Path

import theloom
import torch
from theloom.dataset.activations import Activations

FEATURES, ACTIVE, BATCH = 1024, 32, 256


def main(run: Path, library: str = "saelens", steps: int = 300) -> tuple[float, float]:
    """The fraction of variance unexplained of rows held out, before and after training."""
    acts = theloom.open(run / "activations.h5")
    hook = acts.hooks[len(acts.hooks) // 2]
    rows = (acts.position.numpy(...) > 0).nonzero()[0]
    end = int(0.9 * len(rows))
    train, test = acts.taking(rows[:end]), acts.taking(rows[end:])[hook][:].float()
    found = {"saelens": saelens, "dictionary_learning": dictionary_learning}[library](
        train, hook, steps, test
    )
    print(f"{library}, {hook}: variance unexplained {found[0]:.3f} before, {found[1]:.3f} after")
    return found


def saelens(acts: Activations, hook: str, steps: int, test: torch.Tensor) -> tuple[float, float]:
    """Train a TopK autoencoder of SAELens: its data provider is an iterator without end."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    width = acts[hook].shape[1]
    torch.manual_seed(0)
    normalize = "expected_average_only_in"
    size = TopKTrainingSAEConfig(
        d_in=width, d_sae=FEATURES, k=ACTIVE, normalize_activations=normalize
    )
    config = SAETrainerConfig(
        total_training_samples=steps * BATCH, train_batch_size_samples=BATCH, lr=1e-3, lr_end=1e-4
    )
    sae = TopKTrainingSAE(size)
    provider = acts.batches(hook, BATCH, shuffle=True, drop_last=True, epochs=None, dtype="fp32")
    trainer = SAETrainer(config, sae, provider)
    trainer.activation_scaler.scaling_factor = acts.scale(hook, "saelens")  # no estimate then
    before = unexplained(sae, test * trainer.activation_scaler.scaling_factor)
    return before, unexplained(trainer.fit(), test)  # which folds the factor into the weights


def dictionary_learning(
    acts: Activations, hook: str, steps: int, test: torch.Tensor
) -> tuple[float, float]:
    """Train a TopK autoencoder of dictionary_learning: its buffer is an iterator with a config."""
    from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
    from dictionary_learning.training import trainSAE

    scale = acts.scale(hook, "dictionary_learning")
    buffer = acts.batches(hook, BATCH, shuffle=True, drop_last=True, epochs=None, scale=scale)
    trained: list[TopKTrainer] = []

    def trainer(**settings: object) -> TopKTrainer:
        trained.append(TopKTrainer(**settings))
        return trained[0]

    settings = {"trainer": trainer, "dict_class": AutoEncoderTopK, "layer": 0, "device": "cpu"}
    settings |= {"activation_dim": acts[hook].shape[1], "dict_size": FEATURES, "k": ACTIVE}
    settings |= {"lr": 1e-3, "warmup_steps": 10, "steps": steps, "seed": 0}
    settings |= {"lm_name": buffer.config["model_source"], "submodule_name": hook}
    torch.manual_seed(0)
    before = unexplained(AutoEncoderTopK(acts[hook].shape[1], FEATURES, ACTIVE), test * scale)
    trainSAE(buffer, [settings], steps, device="cpu")
    return before, unexplained(trained[0].ae, test * scale)


def unexplained(model: torch.nn.Module, rows: torch.Tensor) -> float:
    """The fraction of variance unexplained."""
    with torch.no_grad():
        left = (model(rows) - rows).square().sum()
    return float(left / (rows - rows.mean(dim=0)).square().sum())


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:3], *map(int, sys.argv[3:4]))
