"""The GPUs to plan for, and where to rent some: what a run fits on that this machine does not have.

Names, nominal memory and compute capabilities are gpuhunt's (a catalog that dstack maintains),
with the boards that it lacks, and two capabilities that it has wrong, by NVIDIA's lists
(developer.nvidia.com/cuda-gpus, /cuda-legacy-gpus).
"""

import re
from dataclasses import dataclass
from functools import cache

from theloom.precision import BF16_CAPABILITY, FP16_CAPABILITY

GIB = 1 << 30

# What a program gets of the nominal size, in GiB: the least total that torch names in public
# out-of-memory messages and device properties (2021 to 2026). Drivers differ, and newer ones
# reserve more.
_SEEN = {
    ("A10", 24): 21.99,
    ("A10G", 24): 22.03,
    ("A30", 24): 23.53,
    ("A100", 40): 39.39,
    ("A100", 80): 79.14,
    ("A4000", 16): 15.61,
    ("A5000", 24): 23.54,
    ("A6000", 48): 47.26,
    ("B200", 180): 178.35,
    ("GH200", 96): 94.50,
    ("H100", 80): 79.10,
    ("H100NVL", 94): 93.00,
    ("H200", 141): 139.72,
    ("L4", 24): 22.03,
    ("L40", 48): 44.34,
    ("L40S", 48): 44.34,
    ("RTX2060", 6): 5.79,
    ("RTX2080Ti", 11): 10.57,
    ("RTX3080", 10): 9.75,
    ("RTX3090", 24): 23.56,
    ("RTX4090", 24): 23.51,
    ("RTX5060Ti", 16): 15.44,
    ("RTX5090", 32): 31.35,
    ("RTX6000Ada", 48): 44.43,
    ("RTXPRO6000", 96): 94.96,
    ("T4", 16): 14.56,
    ("V100", 16): 15.75,
    ("V100", 32): 31.73,
}

# For the rest, a share below all that was seen of their kind. ECC takes a sixteenth of GDDR memory
# where it is on; HBM has bits of its own for it, and GeForce and TITAN boards have none.
_SHARE = 0.96
_SHARE_WITH_ECC = 0.90
_HBM = re.compile(r"A30|A100|G?[HB][123]00(NVL)?|GB[23]00|GH200|[PV]100|TITANV")
_WITHOUT_ECC = re.compile(r"RTX[2-5]0[5-9]0.*|GTX.*|TITAN.*")

_CORRECTED = {"B300": (10, 3), "GB300": (10, 3)}

# Boards that gpuhunt lacks: name, nominal GB, compute capability.
_MORE: tuple[tuple[str, int, tuple[int, int]], ...] = (
    ("GTX950", 2, (5, 2)),
    ("GTX960", 2, (5, 2)),
    ("GTX960", 4, (5, 2)),
    ("GTX970", 4, (5, 2)),
    ("GTX980", 4, (5, 2)),
    ("GTX980Ti", 6, (5, 2)),
    ("GTXTITANX", 12, (5, 2)),
    ("M40", 12, (5, 2)),
    ("M40", 24, (5, 2)),
    ("GTX1050", 2, (6, 1)),
    ("GTX1050Ti", 4, (6, 1)),
    ("GTX1060", 3, (6, 1)),
    ("GTX1060", 6, (6, 1)),
    ("GTX1070", 8, (6, 1)),
    ("GTX1070Ti", 8, (6, 1)),
    ("GTX1080", 8, (6, 1)),
    ("GTX1080Ti", 11, (6, 1)),
    ("TITANXp", 12, (6, 1)),
    ("P4", 8, (6, 1)),
    ("P40", 24, (6, 1)),
    ("TITANV", 12, (7, 0)),
    ("GTX1650", 4, (7, 5)),
    ("GTX1660", 6, (7, 5)),
    ("GTX1660Ti", 6, (7, 5)),
    ("TITANRTX", 24, (7, 5)),
    ("RTX8000", 48, (7, 5)),
    ("A30", 24, (8, 0)),
    ("A2", 16, (8, 6)),
    ("RTX3080", 12, (8, 6)),
    ("RTX5000Ada", 32, (8, 9)),
)

# Peak dense TFLOP/s with 16-bit inputs (BF16; V100 and T4: FP16), by NVIDIA's data sheets, without
# sparsity. V100 is the SXM2 board's; the PCIe board reaches 112.
_TFLOPS = {
    "T4": 65,
    "V100": 125,
    "L4": 121,
    "L40": 181,
    "L40S": 362,
    "A10": 125,
    "A30": 165,
    "A40": 150,
    "A6000": 155,
    "RTX6000Ada": 182,
    "RTX3090": 71,
    "RTX4090": 165,
    "A100": 312,
    "H100": 989,
    "H200": 989,
    "GH200": 989,
    "B200": 2250,
    # Variants, counted as the board that they are a variant of.
    "RTX3090Ti": 71,
    "H100NVL": 989,
    "GB200": 2250,
}

# GPUs of which the estimate compares resident and layer-by-layer runs.
PLANNED = (
    "T4",
    "V100 16 GB",
    "V100 32 GB",
    "L4",
    "A10",
    "RTX 3090",
    "RTX 4090",
    "RTX A6000",
    "L40S",
    "A100 40 GB",
    "A100 80 GB",
    "H100",
    "H200",
)

# GPUs in the report's figure: one or two of each generation and size.
REPORTED = (
    "GTX 1080 Ti",
    "RTX 2080 Ti",
    "RTX 3060 12 GB",
    "T4",
    "RTX 4080",
    "A10",
    "RTX 3090",
    "RTX 4090",
    "RTX 5090",
    "A100 40 GB",
    "L40S",
    "A100 80 GB",
    "H100",
    "H200",
    "B200",
)

_WORKSTATION = {
    "A4000": "RTX A4000",
    "A4500": "RTX A4500",
    "A5000": "RTX A5000",
    "A6000": "RTX A6000",
    "RTX6000": "Quadro RTX 6000",
    "RTX8000": "Quadro RTX 8000",
}


@dataclass(frozen=True)
class GPU:
    """A GPU model. `nominal_gb` is what it is sold as, `usable_bytes` what a program gets of it at
    least.

    `bf16` and `fp16` say whether `precision_mode` can be so on it: arithmetic, not storage, which
    every GPU has.
    """

    name: str
    nominal_gb: int
    usable_bytes: int
    compute_capability: tuple[int, int]
    bf16: bool
    fp16: bool
    model: str  # gpuhunt's name, without the memory
    tflops: float | None  # peak of dense 16-bit products; None: not listed

    def computes(self, kind: str) -> bool:
        """Whether it computes with a kind of weights: beside quantised ones any 16 bits do.

        Args:
            kind: `WeightFormat.name`, such as `bf16` or `int8`.

        Returns:
            True where it does.

        Examples:
            >>> t4 = find("t4")[0]
            >>> t4.computes("bf16"), t4.computes("fp16"), t4.computes("int8")
            (False, True, True)
        """
        return self.bf16 if kind == "bf16" else self.fp16 or kind == "fp32"


@dataclass(frozen=True)
class CloudOffer:
    """A machine to rent: `number` GPUs of `gpu_gb` GB (nominal) each. No prices: they change by the
    week.

    `remark` says where an offer is not, or not so, in the provider's list at the time of
    `CLOUD_AS_OF`.
    """

    provider: str
    offer: str
    gpu: str
    number: int
    gpu_gb: int
    remark: str = ""

    @property
    def memory_gb(self) -> int:
        """The memory of all its GPUs, in nominal GB."""
        return self.number * self.gpu_gb

    @property
    def best_for(self) -> str:
        """The largest of the usual model sizes that it extracts in 16 bits, "" if none.

        By the rule of thumb of 2 bytes a parameter and 30 % on top, for the cache, the activations
        and CUDA itself.
        """
        fitting = [size for size in (3, 7, 13, 30, 70) if size * 2 * 1.3 <= self.memory_gb]
        return f"{fitting[-1]}B" if fitting else ""


CLOUD_AS_OF = "2026-11"

CLOUD = (
    CloudOffer("RunPod", "RTX 4090", "RTX 4090", 1, 24),
    CloudOffer("RunPod", "A100-40G", "A100 40 GB", 1, 40, "no longer listed: its A100s have 80 GB"),
    CloudOffer("RunPod", "L40S", "L40S", 1, 48),
    CloudOffer("RunPod", "A100 SXM", "A100 80 GB", 1, 80),
    CloudOffer("RunPod", "H100 SXM", "H100", 1, 80),
    CloudOffer("RunPod", "H200", "H200", 1, 141),
    CloudOffer("Lambda", "1x A100 SXM 40 GB", "A100 40 GB", 1, 40),
    CloudOffer("Lambda", "A100-80G", "A100 80 GB", 1, 80, "listed in machines of 8 only"),
    CloudOffer("Lambda", "8x A100 SXM 80 GB", "A100 80 GB", 8, 80),
    CloudOffer("Lambda", "1x H100 PCIe", "H100", 1, 80),
    CloudOffer("Lambda", "1x GH200", "GH200", 1, 96),
    CloudOffer("AWS", "g5.xlarge", "A10G", 1, 24),
    CloudOffer("AWS", "g6.xlarge", "L4", 1, 24),
    CloudOffer("AWS", "g6e.xlarge", "L40S", 1, 48),
    CloudOffer("AWS", "g5.12xlarge", "A10G", 4, 24),
    CloudOffer("AWS", "p4d.24xlarge", "A100 40 GB", 8, 40),
    CloudOffer("AWS", "p5.48xlarge", "H100", 8, 80),
    CloudOffer("Google Cloud", "g2-standard-4", "L4", 1, 24),
    CloudOffer("Google Cloud", "a2-highgpu-1g", "A100 40 GB", 1, 40),
    CloudOffer("Google Cloud", "a2-ultragpu-1g", "A100 80 GB", 1, 80),
    CloudOffer("Google Cloud", "a3-highgpu-8g", "H100", 8, 80),
    CloudOffer("Azure", "Standard_NC24ads_A100_v4", "A100 80 GB", 1, 80),
    CloudOffer("Azure", "Standard_ND96asr_v4", "A100 40 GB", 8, 40),
    CloudOffer("Azure", "Standard_ND96isr_H100_v5", "H100", 8, 80),
)


@cache
def gpus() -> tuple[GPU, ...]:
    """NVIDIA's GPUs. Needs no network; the first call imports gpuhunt (0.1 s).

    Returns:
        The models, by memory and then by name.
    """
    from gpuhunt import KNOWN_NVIDIA_GPUS

    known = {
        (g.name, g.memory): _CORRECTED.get(g.name, g.compute_capability) for g in KNOWN_NVIDIA_GPUS
    }
    boards = {(name, memory): capability for name, memory, capability in _MORE} | known
    sizes: dict[str, int] = {}
    for name, _ in boards:
        sizes[name] = sizes.get(name, 0) + 1
    found = [
        GPU(
            _human(name) + (f" {memory} GB" if sizes[name] > 1 else ""),
            memory,
            usable_bytes(name, memory),
            capability,
            capability >= BF16_CAPABILITY,
            capability >= FP16_CAPABILITY,
            name,
            _TFLOPS.get(name),
        )
        for (name, memory), capability in boards.items()
    ]
    return tuple(sorted(found, key=lambda gpu: (gpu.nominal_gb, gpu.name)))


def find(scheduler_name: str) -> tuple[GPU, ...]:
    """The GPUs that a scheduler's name such as `l40s` or `nvidia-a100-sxm4-80gb` may mean.

    The longest model name in it wins, so `l40s` is no L40. Several boards of one model remain where
    the name does not state their memory. An abbreviation such as `rtx30` gives all that it begins.

    Args:
        scheduler_name: name of a GPU; case and punctuation do not matter.

    Returns:
        The boards by memory; empty for an unknown or empty name.

    Examples:
        >>> [gpu.model for gpu in find("nvidia_l40s")]
        ['L40S']
    """
    name = _plain(scheduler_name)
    if not name:
        return ()
    lengths = {gpu: max((len(a) for a in _aliases(gpu) if a in name), default=0) for gpu in gpus()}
    longest = max(lengths.values())
    if not longest:
        return tuple(g for g in gpus() if any(a.startswith(name) for a in _aliases(g)))
    boards = tuple(gpu for gpu, length in lengths.items() if length == longest)
    return tuple(g for g in boards if f"{g.nominal_gb}gb" in name) or boards


def _aliases(gpu: GPU) -> set[str]:
    model = _plain(gpu.model)
    human = _plain(_human(gpu.model))
    return {model, human, model.removeprefix("rtx") or model}


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def usable_bytes(name: str, nominal_gb: int) -> int:
    """Compute what a program gets of a board's memory, at least.

    A nominal GB is 2³⁰ bytes of memory chips. The driver takes some of it, and so does ECC where it
    is on, as it is by default on data-center boards.

    Args:
        name: gpuhunt's, without spaces.
        nominal_gb: what it is sold as.

    Returns:
        Bytes; as seen on such a board where one was, else a share of the nominal memory.

    Examples:
        >>> usable_bytes("L40S", 48) < 48 * 2**30
        True
    """
    if seen := _SEEN.get((name, nominal_gb)):
        return int(seen * GIB)
    without_ecc = _HBM.fullmatch(name) or _WITHOUT_ECC.fullmatch(name)
    return int(nominal_gb * (_SHARE if without_ecc else _SHARE_WITH_ECC) * GIB)


def _human(name: str) -> str:
    """RTX4070TiSUPER to RTX 4070 Ti SUPER, A4000 to RTX A4000."""
    borders = (
        r"(?<=RTX)(?=[P\d])|(?<=GTX)(?=[T\d])|(?<=PRO)(?=\d)|(?<=TITAN)(?=.)"
        r"|(?<=[\di])(?=Ti|SUPER|NVL|Ada)"
    )
    return _WORKSTATION.get(name, re.sub(borders, " ", name))
