"""The logit lens: what each layer would predict, were it the last one.

    .venv/bin/python workflow/docs/examples/logit_lens.py results/examples

Each state goes through the model's own final norm and LM head. The result by layer: how often its
first choice is the final one, and the probability of the next token. It reads the run of probe.py;
the last block must be among the hook points.
"""

import sys
from pathlib import Path

import theloom
import torch
from theloom.config.schema import ModelConfig
from theloom.dataset.activations import Activations
from theloom.model.files import prepare_files
from transformers import AutoModelForCausalLM, PreTrainedModel


def model_of(acts: Activations) -> PreTrainedModel:
    """The model that the rows came from, in FP32."""
    files = prepare_files(ModelConfig(source=acts.attributes["model_source"]))
    return AutoModelForCausalLM.from_pretrained(files.folder, dtype=torch.float32).eval()


@torch.inference_mode()
def lens(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """States (rows, width) as logits (rows, vocabulary)."""
    return model.get_output_embeddings()(model.base_model.norm(states.float()))


def main(run: Path, rows_read: int = 1024) -> dict[str, tuple[float, float]]:
    """By hook point: agreement with the last one's first choice, and mean probability of the next
    token.
    """
    acts = theloom.open(run / "activations.h5")
    document = acts.document_of.numpy(slice(0, rows_read + 1))
    rows = (document[1:] == document[:-1]).nonzero()[0]
    following = torch.from_numpy(acts.input_ids.numpy(rows + 1).astype("int64"))
    model = model_of(acts)
    final = lens(model, acts[acts.hooks[-1]][rows]).argmax(dim=-1)
    agreement = {}
    for hook in acts.hooks:
        logits = lens(model, acts[hook][rows])
        agrees = float((logits.argmax(dim=-1) == final).float().mean())
        probability = float(logits.softmax(dim=-1).gather(1, following[:, None]).mean())
        agreement[hook] = (agrees, probability)
        print(f"{hook:<28} agrees with the last {agrees:.3f}   next token {probability:.4f}")
    return agreement


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "results/examples"))
