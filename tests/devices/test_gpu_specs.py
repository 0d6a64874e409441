"""The table of GPUs to plan for."""

import subprocess
import sys

import pytest
from omegaconf import OmegaConf
from theloom.config import sharding
from theloom.config.schema import Config
from theloom.devices import gpu_specs
from theloom.devices.gpu_specs import GIB

NAMED = {gpu.name: gpu for gpu in gpu_specs.gpus()}


@pytest.mark.parametrize(
    ("names", "capability", "bf16", "fp16"),
    [
        (
            ["RTX 4060", "RTX 4070 Ti SUPER", "RTX 4080 SUPER", "RTX 4090", "L4", "L40S"],
            (8, 9),
            True,
            True,
        ),
        (
            ["RTX 3060 12 GB", "RTX 3080 10 GB", "RTX 3080 12 GB", "RTX 3090", "RTX A6000", "A10"],
            (8, 6),
            True,
            True,
        ),
        (["A100 40 GB", "A100 80 GB", "A30"], (8, 0), True, True),
        (["H100", "H100 NVL", "H200", "GH200"], (9, 0), True, True),
        (
            ["RTX 2060 SUPER", "RTX 2080 Ti", "T4", "GTX 1660", "Quadro RTX 6000"],
            (7, 5),
            False,
            True,
        ),
        (["V100 16 GB", "V100 32 GB"], (7, 0), False, True),
        (["GTX 1050 Ti", "GTX 1060 6 GB", "GTX 1080", "GTX 1080 Ti", "P40"], (6, 1), False, True),
        (
            ["GTX 950", "GTX 960 4 GB", "GTX 970", "GTX 980", "GTX 980 Ti", "GTX TITAN X"],
            (5, 2),
            False,
            False,
        ),
        (["B200", "GB200"], (10, 0), True, True),
        (["B300", "GB300"], (10, 3), True, True),
        (["RTX 5090", "RTX PRO 6000"], (12, 0), True, True),
    ],
)
def test_capabilities_and_precisions_are_nvidia_s(names, capability, bf16, fp16):
    for name in names:
        gpu = NAMED[name]
        assert (gpu.compute_capability, gpu.bf16, gpu.fp16) == (capability, bf16, fp16)


@pytest.mark.parametrize(
    ("name", "nominal", "usable"),
    [
        ("A100 40 GB", 40, 39.39),
        ("A100 80 GB", 80, 79.14),
        ("RTX 4090", 24, 23.51),
        ("T4", 16, 14.56),
        ("L40S", 48, 44.34),
        ("GTX 1080 Ti", 11, 10.56),  # by the rule: no ECC
        ("A40", 48, 43.2),  # GDDR with ECC
        ("P100", 16, 15.36),  # HBM
    ],
)
def test_usable_memory(name, nominal, usable):
    assert (NAMED[name].nominal_gb, round(NAMED[name].usable_bytes / GIB, 2)) == (nominal, usable)


def test_usable_is_below_nominal_and_no_rule_is_above_what_was_seen():
    for gpu in gpu_specs.gpus():
        assert 0.85 < gpu.usable_bytes / GIB / gpu.nominal_gb < 1
    for (name, nominal), seen in gpu_specs._SEEN.items():
        without_ecc = gpu_specs._HBM.fullmatch(name) or gpu_specs._WITHOUT_ECC.fullmatch(name)
        assert nominal * (gpu_specs._SHARE if without_ecc else gpu_specs._SHARE_WITH_ECC) < seen


def test_every_figure_seen_is_of_a_gpu_in_the_table():
    usable = {gpu.usable_bytes for gpu in gpu_specs.gpus()}
    assert all(int(seen * GIB) in usable for seen in gpu_specs._SEEN.values())


def test_names_are_one_each_and_in_order():
    gpus = gpu_specs.gpus()
    assert len({gpu.name for gpu in gpus}) == len(gpus) > 80
    assert list(gpus) == sorted(gpus, key=lambda gpu: (gpu.nominal_gb, gpu.name))


def test_the_table_needs_no_network():
    source = """
import socket
def refuse(*arguments, **options):
    raise AssertionError("the network was requested")
socket.socket.connect = socket.getaddrinfo = refuse
from theloom.devices import gpu_specs
print(len(gpu_specs.gpus()))
"""
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == len(gpu_specs.gpus())


@pytest.mark.parametrize(
    ("provider", "offer", "memory", "model"),
    [
        ("RunPod", "RTX 4090", 24, "7B"),
        ("RunPod", "A100-40G", 40, "13B"),
        ("Lambda", "A100-80G", 80, "30B"),
        ("AWS", "p4d.24xlarge", 320, "70B"),
    ],
)
def test_cloud_offers(provider, offer, memory, model):
    (found,) = [o for o in gpu_specs.CLOUD if (o.provider, o.offer) == (provider, offer)]
    assert (found.memory_gb, found.best_for) == (memory, model)


def test_every_offer_is_of_a_gpu_in_the_table():
    for offer in gpu_specs.CLOUD:
        assert NAMED[offer.gpu].nominal_gb == offer.gpu_gb


def test_an_offer_too_small_for_any_size():
    assert gpu_specs.CloudOffer("x", "y", "z", 1, 6).best_for == ""


def test_sharding_and_the_estimate_take_one_speed_for_each_gpu():
    config = OmegaConf.structured(Config)
    for gpu in gpu_specs.gpus():
        config.resources.gpu_model = gpu.name
        assert gpu in gpu_specs.find(gpu.name)
        peak = sharding._tflops(config) / sharding.SHARE
        assert peak == pytest.approx(gpu.tflops or sharding.UNNAMED_GPU), gpu.name
    assert {g.tflops for g in gpu_specs.find("l40s")} == {362}
    assert all(NAMED[name].tflops for name in gpu_specs.PLANNED)
