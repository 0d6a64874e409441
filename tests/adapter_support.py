"""Adapters made by PEFT, with weights that are not those of their start, and the model that PEFT
merges them into.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM


def save_adapter(base: Path, folder: Path, config: Any, seed: int = 0) -> Path:
    """A saved adapter of a base model, every tensor of it moved at random."""
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def merge_with_peft(base: Path, adapters: Sequence[Path], **options: Any) -> Any:
    """The oracle: the causal model after PEFT's own `merge_and_unload` of one after the other."""
    model = AutoModelForCausalLM.from_pretrained(base, **options)
    for folder in adapters:
        model = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    return model.eval()
