"""Names, filters and near matches; taps leave the model as it was."""

import pytest
import torch
from support import build_tiny
from theloom.errors import HookError
from theloom.hooks import blocks
from theloom.hooks.points import residual_points, select_points
from theloom.hooks.taps import Taps
from transformers import AutoModel

POINTS = residual_points(30, 576)


def names(*filters: str) -> list[str]:
    return [p.name for p in select_points(filters, POINTS)]


def test_filters_take_exact_names_globs_and_numbers_from_the_end():
    assert names("blocks.5.hook_resid_post") == ["blocks.5.hook_resid_post"]
    assert names("blocks.-1.hook_resid_post", "blocks.-30.hook_resid_pre") == [
        "blocks.0.hook_resid_pre",
        "blocks.29.hook_resid_post",
    ]
    assert names("blocks.*.hook_resid_pre") == [f"blocks.{i}.hook_resid_pre" for i in range(30)]
    assert names("blocks.?.hook_resid_post") == [f"blocks.{i}.hook_resid_post" for i in range(10)]
    assert names("blocks.1.*", "blocks.1.hook_resid_pre") == [
        "blocks.1.hook_resid_pre",
        "blocks.1.hook_resid_post",
    ]


def test_an_empty_filter_is_every_hook_point():
    assert names() == [p.name for p in POINTS]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (
            "blocks.31.hook_resid_pst",
            ["'blocks.31.hook_resid_pst'", "30 blocks", "'blocks.29.hook_resid_post'"],
        ),
        ("blocks.3.hook_resid_poste", ["'blocks.3.hook_resid_post'"]),
        (
            "blocks.-31.hook_resid_post",
            ["'blocks.-31.hook_resid_post'", "'blocks.0.hook_resid_post'"],
        ),
        ("blocks.40.*", ["matches nothing", "0 to 29"]),
        ("layers.3", ["'layers.3'", "blocks.0.hook_resid_pre"]),
        ("blocks.[5].hook_resid_post", ["'blocks.[5].hook_resid_post'"]),
    ],
)
def test_unknown_hook_points_are_refused_with_near_matches(entry, words):
    with pytest.raises(HookError) as caught:
        names(entry)
    for word in words:
        assert word in str(caught.value)


def test_taps_are_removed_and_the_forward_ends_after_the_deepest_block(tmp_path):
    model = AutoModel.from_pretrained(build_tiny("llama", tmp_path)).eval()
    found = blocks.find_blocks(model)
    reached = []
    spy = model.layers[2].register_forward_pre_hook(lambda *_: reached.append(2))
    seen = {}
    with Taps(
        found, select_points(["blocks.1.hook_resid_post"], residual_points(3, 64)), seen.__setitem__
    ) as taps:
        taps.run(input_ids=torch.arange(5)[None])
    assert list(seen) == ["blocks.1.hook_resid_post"]
    assert seen["blocks.1.hook_resid_post"].shape == (1, 5, 64)
    assert reached == []
    spy.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_taps_are_removed_after_an_exception(tmp_path):
    model = AutoModel.from_pretrained(build_tiny("llama", tmp_path)).eval()

    def fail(name, value):
        raise ZeroDivisionError

    with (
        pytest.raises(ZeroDivisionError),
        Taps(blocks.find_blocks(model), residual_points(3, 64), fail) as taps,
    ):
        taps.run(input_ids=torch.arange(5)[None])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
