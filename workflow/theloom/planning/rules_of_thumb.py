"""Rules of thumb for models of 3 to 70 billion parameters against TheLoom's estimates.

The rules are those of the project's specification: weights are the nominal number of parameters
times the bytes of one; totals are recommendations for extraction with 2048 tokens. The reason of
each difference over 10% is given.
"""

from dataclasses import dataclass

from theloom.config.schema import Config
from theloom.devices import gpu_specs
from theloom.hooks import points
from theloom.memory import sizes
from theloom.memory.closed_form import parameters
from theloom.memory.estimators import Estimator
from theloom.memory.sizes import Components, Workload
from theloom.model.weight_format import WEIGHT_FORMATS, WeightFormat
from theloom.planning import forecast
from theloom.planning.estimates import run_models

# nominal size, in billions of parameters
PROFILES = {"3b": 3, "7b": 7, "13b": 13, "30b": 30, "70b": 70}
RULE_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}

RULE_TOTALS = {
    "3b": {"fp32": 16, "fp16": 8, "bf16": 8},
    "7b": {"fp32": 36, "fp16": 18, "bf16": 18},
    "13b": {"fp32": 68, "fp16": 34, "bf16": 34},
    "30b": {"fp32": 160, "fp16": 80, "bf16": 80},
    "70b": {"fp32": 360, "fp16": 180, "bf16": 180},
}

TOKENS = 2048
EXPLAINED_FROM = 0.10


@dataclass(frozen=True)
class Cell:
    """TheLoom's estimate and the rule's, in GB; `reason` explains differences over 10%."""

    computed: float
    rule: float
    reason: str

    @property
    def difference(self) -> float:
        """Relative difference from the rule."""
        return self.computed / self.rule - 1


@dataclass(frozen=True)
class Row:
    """One model."""

    profile: str
    model: str
    parameters: int
    cells: dict[str, Cell]
    gpus: dict[str, str]  # by weight format: the smallest with enough memory


def weights_table() -> list[Row]:
    """Compare the weights alone, as extraction loads them: without the LM head.

    Returns:
        One row per profile.
    """
    rows = []
    for profile, billions in PROFILES.items():
        settings, estimator = _of(profile)
        cells = {}
        for name, rule_bytes in RULE_BYTES.items():
            computed, rule = estimator.weights(WEIGHT_FORMATS[name]) / 1e9, billions * rule_bytes
            cells[name] = _cell(
                computed,
                rule,
                _weights_reason(settings, estimator, WEIGHT_FORMATS[name], billions, rule_bytes),
            )
        rows.append(_row(profile, settings, cells, {}))
    return rows


def totals_table() -> list[Row]:
    """Compare totals: weights, KV cache of 2048 tokens, every residual, and CUDA's overhead.

    Returns:
        One row per profile.
    """
    rows = []
    for profile, rules in RULE_TOTALS.items():
        settings, estimator = _of(profile)
        everything = points.residual_points(estimator.size.num_blocks, estimator.size.hidden_size)
        workload = Workload(1, TOKENS, settings.memory.streaming_chunk_size)
        cells, gpus = {}, {}
        for name, rule in rules.items():
            kind = WEIGHT_FORMATS[name]
            parts = estimator.forward(kind, workload, everything, held=True)
            components = sizes.with_device_overhead(estimator.weights(kind), parts, "cuda")
            beyond = rule - PROFILES[profile] * RULE_BYTES[name]
            cells[name] = _cell(
                components.total / 1e9, rule, _total_reason(components, rule, beyond)
            )
            gpus[name] = _recommended(components.total)
        rows.append(_row(profile, settings, cells, gpus))
    return rows


def _of(profile: str) -> tuple[Config, Estimator]:
    settings = forecast.settings_of(profile)
    return settings, run_models.estimator_of(settings)


def _row(profile: str, settings: Config, cells: dict[str, Cell], gpus: dict[str, str]) -> Row:
    declared = settings.model.architecture
    assert declared is not None
    return Row(profile, settings.model.source, declared.parameters, cells, gpus)


def _cell(computed: float, rule: float, reason: str) -> Cell:
    return Cell(computed, rule, reason if abs(computed / rule - 1) > EXPLAINED_FROM else "")


def _weights_reason(
    settings: Config, estimator: Estimator, kind: WeightFormat, billions: int, rule_bytes: float
) -> str:
    """Steps from the rule to the estimate: real parameters, no LM head, unquantized weights."""
    declared = settings.model.architecture
    assert declared is not None
    counts = parameters(estimator.size, declared.tie_word_embeddings)
    steps = {
        f"{declared.parameters / 1e9:.2f}e9 parameters, not {billions}e9": (
            declared.parameters / 1e9 - billions
        )
        * rule_bytes,
        "LM head not loaded": -counts.lm_head * rule_bytes / 1e9,
    }
    if kind.quantization:
        whole = counts.other * (2 - rule_bytes) / 1e9
        steps["embeddings and norms stay 16-bit"] = whole
        steps["scales of the quantized weights"] = (
            estimator.weights(kind) / 1e9 - counts.base * rule_bytes / 1e9 - whole
        )
    return _sum_of(steps)


def _total_reason(components: Components, rule: float, beyond: float) -> str:
    steps = {
        "weights": components.weights / 1e9 - (rule - beyond),
        f"KV cache, activations, temporaries and CUDA, against {beyond:.0f} GB in the rule": (
            components.total - components.weights
        )
        / 1e9
        - beyond,
    }
    return _sum_of(steps)


def _sum_of(steps: dict[str, float]) -> str:
    return "; ".join(
        f"{text}: {value:+.2f} GB" for text, value in steps.items() if abs(value) >= 0.005
    )


def _recommended(needed: int) -> str:
    """The smallest GPU with enough memory, or how many of 80 GB together."""
    fitting = [gpu for gpu in gpu_specs.gpus() if gpu.usable_bytes >= needed and gpu.bf16]
    if fitting:
        smallest = [gpu.name for gpu in fitting if gpu.nominal_gb == fitting[0].nominal_gb]
        return f"{' / '.join(smallest[:2])} ({fitting[0].nominal_gb} GB)"
    large = next(gpu for gpu in gpu_specs.gpus() if gpu.name == "A100 80 GB")
    return f"{-(-needed // large.usable_bytes)} × A100 80 GB"
