"""Grouped queries on CUDA: keys are repeated where no fused kernel shares them, and a trace counts
what that takes.
"""

import pytest
import torch
from theloom.memory import trace
from theloom.memory.sizes import Workload
from theloom.model import attention_kernels
from theloom.model.attention_kernels import traced_as_cuda
from theloom.model.fake import fake_model
from transformers import LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

HEADS, KV_HEADS, WIDTH, TOKENS = 8, 2, 16, 64


def attention(dtype, capability=None, mask=None):
    """Attention of grouped queries, and how it called torch's."""
    module = torch.nn.Module()
    module.num_key_value_groups = HEADS // KV_HEADS
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, TOKENS, WIDTH).to(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    calls, real = [], torch.nn.functional.scaled_dot_product_attention

    def recorded(*args, **kwargs):
        calls.append((args[1].shape[1], kwargs.get("enable_gqa", False)))
        return real(*args, **kwargs)

    torch.nn.functional.scaled_dot_product_attention = recorded
    try:
        if capability is None:
            rows, _ = sdpa_attention_forward(module, query, key, value, mask)
        else:
            with traced_as_cuda(capability):
                rows, _ = sdpa_attention_forward(module, query, key, value, mask)
    finally:
        torch.nn.functional.scaled_dot_product_attention = real
    return rows, calls[0]


@pytest.mark.parametrize(
    ("dtype", "capability", "called"),
    [
        (torch.float32, (9, 0), (HEADS, False)),
        (torch.float32, (8, 0), (HEADS, False)),
        (torch.float16, (7, 5), (HEADS, False)),
        (torch.bfloat16, (8, 0), (KV_HEADS, True)),
        (torch.float16, (8, 6), (KV_HEADS, True)),
    ],
)
def test_keys_are_repeated_where_no_fused_kernel_shares_them(dtype, capability, called):
    rows, found = attention(dtype, capability)
    assert found == called
    attention_kernels.repeat_keys_where_needed()
    plain, on_the_cpu = attention(dtype)
    assert on_the_cpu == (KV_HEADS, True)  # the CPU's own kernel shares keys of any precision
    torch.testing.assert_close(rows, plain, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-2
                               if dtype != torch.float32 else 1e-6)  # fmt: skip


def test_a_trace_counts_repeated_keys_on_a_gpu():
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        vocab_size=64,
    )
    of_all_heads, made = 512 * HEADS * WIDTH * 4, {}
    for device in ("cpu", "cuda"):
        fake = fake_model(config, "fp32")
        _, live = trace.trace(fake, Workload(1, 512, 512), [], device=device)
        made[device] = sum(nbytes == of_all_heads for _, nbytes in live.events)
    assert made["cuda"] == made["cpu"] + 2  # keys and values
