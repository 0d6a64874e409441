"""`theloom estimate`: its figures against the trace and public numbers, its tables and errors."""

import json
import subprocess
import sys

import fake_nvml
import pytest
from fake_nvml import Board
from theloom.cli import main
from theloom.devices import gpu_specs
from theloom.errors import ConfigError, HookError
from theloom.planning import forecast, rules_of_thumb


def test_a_7b_is_broken_down_as_its_numbers_say():
    found = forecast.forecast("7b", "fp16", windows=1, tokens=2048)
    assert found.weights == pytest.approx(2 * (7_248_023_552 - 32768 * 4096), rel=1e-6)
    assert found.lm_head == 2 * 32768 * 4096
    assert found.kv_cache == 2 * 32 * 8 * 128 * 2 * 2048
    assert found.captured_full == 33 * 2048 * 4096 * 2
    block = (
        2 + 8 * 4096 + 3 * 1024 + 2 * 32 * 2048 + 3 * 14336
    )  # beside the residuals before and after it
    assert found.captured_every == (32 * block + 33 * 4096 + 4096 + 1 + 2 * 4096) * 2048 * 2
    assert found.captured_selected == 3 * 2048 * 4096 * 2
    assert found.pipeline.total < found.held_selected.total < found.held_full.total
    assert found.held_full.allocated < found.held_full.reserved < found.held_full.total
    assert found.disk_per_million_tokens == 10**6 * (3 * 4096 * 2 + 12 + 9)
    assert (
        found.totals["fp32"] > found.totals["fp16"] == found.totals["bf16"] > found.totals["int8"]
    )


def test_the_trace_gives_the_forecast_of_the_closed_form():
    formula = forecast.forecast("3b", tokens=1024)
    traced = forecast.forecast("3b", tokens=1024, trace=True)
    assert (formula.method, traced.method) == ("closed form", "trace")
    for name in ("held_full", "held_selected", "pipeline"):
        assert getattr(formula, name).total == pytest.approx(getattr(traced, name).total, rel=1e-3)


def test_the_largest_batch_of_a_gpu_fits_it_and_one_more_does_not():
    found = forecast.forecast("7b", "bf16")
    names = {
        gpu.name
        for gpu in gpu_specs.gpus()
        if gpu.usable_bytes >= found.pipeline.on(gpu.compute_capability).total and gpu.bf16
    }
    assert {gpu.name for gpu in found.gpus} == names
    gpu = next(gpu for gpu in found.gpus if gpu.name == "RTX 4090")
    limit = forecast.HEADROOM * gpu.usable_bytes
    assert forecast.forecast("7b", "bf16", windows=gpu.largest_batch).pipeline.total <= limit
    assert forecast.forecast("7b", "bf16", windows=gpu.largest_batch + 2).pipeline.total > limit
    turing = {gpu.name for gpu in gpu_specs.gpus() if gpu.compute_capability == (7, 5)}
    assert not turing & {gpu.name for gpu in found.gpus}  # no BF16 there
    assert turing & {gpu.name for gpu in forecast.forecast("7b", "int4").gpus}


def test_what_libraries_take_is_that_of_the_gpu_named_or_at_hand(monkeypatch, capsys):
    more = (32 << 20) - (8320 << 10)  # cuBLAS's workspace on Hopper and on Ampere
    ampere, hopper = (forecast.forecast("7b", "bf16", capability=c) for c in ((8, 0), (9, 0)))
    for name in ("pipeline", "held_full", "held_selected"):
        assert getattr(hopper, name).total - getattr(ampere, name).total == more
    assert hopper.totals["bf16"] - ampere.totals["bf16"] == more
    assert hopper.layerwise.device - ampere.layerwise.device == more
    assert (hopper.gpus, hopper.gpu_modes) == (ampere.gpus, ampere.gpu_modes)  # each by its own
    fake_nvml.install(monkeypatch, [Board("GPU-aa", "NVIDIA H200", (9, 0))])
    printed = []
    for arguments in ([], ["--gpu", "a100"]):
        assert main.main(["estimate", "7b", "--precision", "bf16", "--json", *arguments]) == 0
        report = json.loads(capsys.readouterr().out)
        printed.append((report["capability"], report["pipeline"]["total"]))
    assert printed == [([9, 0], hopper.pipeline.total), ([8, 0], ampere.pipeline.total)]
    assert main.main(["estimate", "7b", "--gpu", "nonsuch"]) == 1
    assert "no known GPU is named 'nonsuch'; theloom gpus --all" in capsys.readouterr().err
    assert main.main(["estimate", "7b", "--gpu", "h100"]) == 0
    assert "cuBLAS, compute capability 9.0" in capsys.readouterr().out
    fake_nvml.install(monkeypatch, [])
    assert forecast.capability_of(None) == (8, 0)


def test_a_model_of_another_architecture_is_traced(tiny_llama):
    found = forecast.forecast(str(tiny_llama), "fp32", tokens=100)
    assert found.method == "closed form"
    from support import build_tiny

    gpt2 = build_tiny("gpt2", tiny_llama.parent / "gpt2")
    traced = forecast.forecast(str(gpt2), "fp32", tokens=100, filters=["blocks.1.hook_resid_p*"])
    assert traced.method == "trace"
    assert traced.hooks == ["blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"]


@pytest.mark.parametrize("target", ["8b", "nothing"])
def test_a_target_that_is_nothing_is_named_with_the_choices(target):
    with pytest.raises(ConfigError, match=rf"'{target}' is neither a profile \(13b, .*owner/name"):
        forecast.forecast(target)


def test_an_unknown_hook_point_is_refused():
    with pytest.raises(HookError, match=r"did you mean 'blocks\.31\.hook_resid_post'"):
        forecast.forecast("7b", filters=["blocks.32.hook_resid_post"])


def test_every_difference_over_a_tenth_is_explained_by_its_parts():
    for row in [*rules_of_thumb.weights_table(), *rules_of_thumb.totals_table()]:
        for cell in row.cells.values():
            assert bool(cell.reason) == (abs(cell.difference) > 0.10)
            steps = [
                float(part.rpartition(": ")[2].removesuffix(" GB"))
                for part in cell.reason.split("; ")
                if part
            ]
            if steps:
                assert sum(steps) == pytest.approx(cell.computed - cell.rule, abs=0.02)


def test_the_command_prints_tables_and_json(capsys):
    assert main.main(["estimate", "70b"]) == 0
    text = capsys.readouterr().out
    for component in (
        "weights",
        "KV cache of 2048 tokens",
        "activation cache, full",
        "total, selective cache",
    ):
        assert component in text
    assert "largest batch × tokens" in text
    assert (
        main.main(
            ["estimate", "7b", "--batch", "4", "--tokens", "512", "--precision", "fp16", "--json"]
        )
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert (report["windows"], report["tokens"], report["kind"]) == (4, 512, "fp16")
    assert report["pipeline"]["total"] == forecast.forecast("7b", "fp16", 4, 512).pipeline.total
    assert main.main(["estimate", "--table"]) == 0
    text = capsys.readouterr().out
    assert "Differences over 10%" in text
    assert "4 × A100 80 GB" in text


def test_mistakes_on_the_command_line_end_on_one_line(capsys):
    assert main.main(["estimate"]) == 1
    assert "name a profile or a model" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main.main(["estimate", "7b", "--tokens", "0"])
    assert "'0' is no integer from 1 on" in capsys.readouterr().err


def test_the_closed_form_needs_no_torch():
    code = (
        "import sys; from theloom.cli import main; main.main(['estimate', '70b']); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
