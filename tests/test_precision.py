"""The fallback chain, by compute capability."""

import logging

import pytest
import torch
from theloom import precision


@pytest.mark.parametrize(
    ("requested", "capability", "resolved", "fallbacks"),
    [
        ("auto", (9, 0), "bf16", 0),
        ("auto", (8, 0), "bf16", 0),
        ("auto", (7, 5), "fp16", 1),
        ("auto", (5, 2), "fp32", 2),
        ("bf16", (8, 9), "bf16", 0),
        ("bf16", (6, 1), "fp16", 1),
        ("bf16", (5, 2), "fp32", 2),
        ("fp16", (5, 3), "fp16", 0),
        ("fp16", (5, 2), "fp32", 1),
        ("fp32", (9, 0), "fp32", 0),
        ("fp32", (5, 2), "fp32", 0),
        ("auto", None, "fp32", 0),
        ("bf16", None, "bf16", 0),
        ("fp16", None, "fp16", 0),
    ],
)
def test_fallback_chain(requested, capability, resolved, fallbacks, caplog):
    with caplog.at_level(logging.WARNING):
        found = precision.choose_precision(requested, capability)
    assert (found.requested, found.resolved, len(found.steps)) == (requested, resolved, fallbacks)
    assert len(caplog.records) == fallbacks


def test_fp16_falls_back_on_a_cpu_that_lacks_it():
    assert precision.choose_precision("fp16", None, cpu_has_fp16=False).resolved == "fp32"


def test_dtypes_round_trip():
    for name in ("fp32", "fp16", "bf16"):
        assert precision.precision_of(precision.torch_dtype(name)) == name


def test_this_torch_says_whether_it_runs_fp16_on_the_cpu():
    x = torch.ones(1, 1, 8, 8, dtype=torch.float16)
    try:
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
        runs = True
    except RuntimeError:
        runs = False
    assert precision.cpu_has_fp16() == runs
