"""The command line."""

import io
import json
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points

import fake_nvml
import psutil
import pytest
import torch
from fake_nvml import Board
from theloom import terminal as terminal_module
from theloom.cli import estimate, main
from theloom.devices import nvml
from theloom.devices.gpu import GPUInfo, GPUManager
from theloom.errors import ConfigError
from theloom.terminal import bold, red


def theloom(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "theloom.cli.main", *arguments], capture_output=True, text=True
    )


def test_help_is_quick_and_lists_the_commands():
    source = "import sys; from theloom.cli import main\n"
    source += "try: main.main(['--help'])\nexcept SystemExit: pass\n"
    source += "assert not {'torch', 'gpuhunt', 'psutil', 'transformers'} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True
    )
    assert "gpus" in done.stdout
    done.stdout.encode("ascii")  # for any terminal


def test_the_command_is_installed_under_its_name():
    (command,) = [e for e in entry_points(group="console_scripts") if e.name == "theloom"]
    assert command.load() is main.main


@pytest.mark.parametrize("arguments", [[], ["gpu"], ["gpus", "--yaml"]])
def test_a_wrong_command_line_is_explained(arguments):
    done = theloom(*arguments)
    assert done.returncode == 2
    assert "usage: theloom" in done.stderr


def test_gpus():
    done = theloom("gpus", "--all")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "RTX 4090 24 25.2 23.5 8.9 yes yes" in lines
    assert "GTX 980 4 4.1 3.8 5.2 no storage only" in lines
    assert "AWS p4d.24xlarge 8 × A100 40 GB 320 70B" in lines
    assert max(map(len, done.stdout.splitlines())) <= 80
    if not torch.cuda.is_available():
        assert any(line.startswith("0 CPU – ") and line.endswith(" FP32") for line in lines)
        assert any(line.startswith("CPU: no GPU: torch ") for line in lines)


def test_gpus_lists_the_usual_ones_and_counts_the_others():
    printed = theloom("gpus").stdout
    assert "RTX 4090" in printed
    assert "GTX 980" not in printed
    assert re.search(r"… and \d+ others \(--all\)", printed)


def test_gpus_as_json():
    report = json.loads(theloom("gpus", "--json").stdout)
    machine = report["machine"][0]
    assert machine["index"] == 0
    assert 0 < machine["used_memory_gb"] < machine["total_memory_gb"]
    assert {
        "name": "H100",
        "nominal_gb": 80,
        "compute_capability": [9, 0],
        "bf16": True,
    }.items() <= next(gpu for gpu in report["gpus"] if gpu["name"] == "H100").items()
    assert report["cloud"]["as_of"] == "2026-11"
    assert report["cloud"]["offers"][0]["best_for"] == "7B"
    if not torch.cuda.is_available():
        assert (machine["name"], machine["auto"]) == ("CPU", "fp32")
        assert machine["total_memory_gb"] * 1e9 <= psutil.virtual_memory().total


def test_gpus_with_processes_and_notes_under_the_table():
    full = GPUInfo(
        *(1, "NVIDIA GTX 980", "GPU-aa", (5, 2), 4.0, 3.0, 1.0, 0.0, 0.0),
        processes=(
            nvml.Process(7, "VLLM::EngineCore", 2 * 10**9, is_vllm=True),
            nvml.Process(8, "x", None, False),
        ),
        note="a reason",
    )
    table = main._machine_table([(full, "fp32")]).splitlines()[-1]
    assert table.split() == [
        "1",
        "NVIDIA",
        "GTX",
        "980",
        "5.2",
        "4.0",
        "(3.7)",
        "3.0",
        "(2.8)",
        "1.0",
        "(0.9)",
        "FP32",
    ]
    assert main._remarks([full]).splitlines() == [
        "",
        "  GPU 1 (NVIDIA GTX 980): VLLM::EngineCore (pid 7, vLLM) 2.0 GB",
        "  GPU 1 (NVIDIA GTX 980): x (pid 8) ? GB",
        "  GPU 1 (NVIDIA GTX 980): a reason",
    ]


def test_a_reader_that_stops_reading():
    script = f"{sys.executable} -m theloom.cli gpus | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout.splitlines(), done.stderr) == (
        ["This machine (memory in GB, and in GiB)", "0"],
        "",
    )


def test_a_user_s_error_is_one_line_and_exit_code_1(monkeypatch, capsys):
    def refuse(self: GPUManager, device: int | None = None) -> None:
        raise ConfigError("what was requested, what was found, what to do")

    monkeypatch.setattr(GPUManager, "get_gpu_info", refuse)
    assert main.main(["gpus"]) == 1
    assert capsys.readouterr().err == "error: what was requested, what was found, what to do\n"


def test_without_cuda_the_driver_s_gpus_are_named(monkeypatch, capsys):
    if torch.backends.cuda.is_built():
        pytest.skip("this torch is built with CUDA")
    fake_nvml.install(monkeypatch, [Board("GPU-aa"), Board("GPU-bb", "NVIDIA T4")])
    assert main.main(["gpus"]) == 0
    assert "is built without CUDA; the driver shows NVIDIA A100-SXM4-80GB, NVIDIA T4" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.gpu(real="other processes")
def test_gpus_of_a_machine_that_has_one():
    machine = json.loads(theloom("gpus", "--json").stdout)["machine"]
    assert [m["name"] for m in machine] == [
        torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
    ]
    assert machine[0]["auto"] in ("bf16", "fp16", "fp32")


@pytest.mark.parametrize("command", [[], ["estimate"], ["gpus"], ["inspect"], ["verify"]])
def test_every_help_has_an_example_and_fits_80_columns(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main.main([*command, "--help"])
    printed = capsys.readouterr().out
    assert f"  theloom {' '.join(command)}" in printed.split("examples:\n")[1]
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize("requested", ["7b", "--table"])
def test_the_estimate_fits_80_columns_and_is_uncoloured_in_a_pipe(requested):
    done = theloom("estimate", requested)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "\033" not in done.stdout


def test_on_a_terminal_headers_are_bold_unless_no_color_is_set(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert bold("x", terminal) == "\033[1mx\033[0m"
    assert red("x", terminal) == "\033[1;31mx\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert bold("x", terminal) == "x"


def test_the_savings_of_training_fit_80_columns():
    row = {"workflow": "inference", "applies": True, "claim": "40-50%", "percent": -9.8}
    row |= {
        "optimisation": "gradient checkpointing",
        "percent_of_activations": -101.6,
        "compared": "word " * 40,
    }
    row |= {"before": {"total": 5.58e11}, "after": {"total": 3.54e11}}
    printed = estimate._savings_table([row, row | {"applies": False}])
    assert max(map(len, printed.splitlines())) <= 80
    assert "no use here" in printed


def test_an_argument_that_is_no_positive_integer_is_rejected(capsys):
    for wrong in ("x", "0", "-1"):
        with pytest.raises(SystemExit):
            main.main(["estimate", "7b", "--batch", wrong])
        assert f"argument --batch: '{wrong}' is no integer from 1 on" in capsys.readouterr().err


def test_long_words_of_a_table_are_folded_into_its_80_columns():
    rows = [["a" * 20, "1", "word " * 30], ["b", "22", "short"]]
    printed = terminal_module.table(rows, ["name", "n", "note"], (1,), fold=2).splitlines()
    assert max(map(len, printed)) <= 80
    assert " ".join(" ".join(line.split()) for line in printed).count("word") == 30


def test_a_shell_completes_options(tmp_path):
    answer = tmp_path / "answer"
    requested = "theloom estimate --pre"
    environment = os.environ | {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "_ARGCOMPLETE_IFS": "\n",
        "COMP_LINE": requested,
        "COMP_POINT": str(len(requested)),
    }
    subprocess.run([sys.executable, "-m", "theloom.cli.main"], env=environment, capture_output=True)
    assert answer.read_text().split() == ["--precision"]
