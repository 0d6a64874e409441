"""The trace of experts whose code counts, or looks for, the tokens of each."""

import copy

import pytest
import torch
from support import allocator_peak
from theloom.hooks import blocks
from theloom.memory import trace
from theloom.memory.sizes import Workload
from theloom.model.fake import fake_model
from tiny_configs import tiny_config
from transformers import AutoModel

WORKLOADS = [Workload(2, 192, 192), Workload(1, 1, 1), Workload(2, 160, 48)]


@pytest.mark.parametrize("name", ["jetmoe", "dbrx"])
def test_trace_gives_the_peak_of_experts(name: str) -> None:
    """JetMoE's is the same wherever tokens go; DBRX's is that of all tokens at the same experts."""
    config = tiny_config(name)
    config.num_hidden_layers = 2
    real = AutoModel.from_config(copy.deepcopy(config)).eval()
    for module in real.modules():
        if type(module).__name__ == "DbrxRouter":
            torch.nn.init.zeros_(module.layer.weight)
    described, fake = blocks.find_blocks(real), fake_model(config, "fp32")
    for workload in WORKLOADS:
        ids = torch.randint(128, (workload.windows, workload.tokens))
        predicted = trace.trace(fake, workload, fake.residuals, held=True)[0].total
        measured = allocator_peak(
            lambda w=workload, ids=ids: trace.run(described, ids, w, fake.residuals, held=True)
        )
        more = 8 * 4  # DBRX's list of experts that have tokens is taken to have all
        assert (predicted - measured) / measured >= -1e-3, (workload, predicted, measured)
        assert predicted <= measured * 1.001 + more, (workload, predicted, measured)
