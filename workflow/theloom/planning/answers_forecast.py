"""What sampling answers takes with one model (`theloom estimate --answers`)."""

from dataclasses import asdict, dataclass

from theloom.devices import gpu_specs
from theloom.memory.sizes import Components
from theloom.planning import answers_plan, disk, estimate, forecast
from theloom.planning.answers_plan import MOST
from theloom.planning.estimates import run_models


@dataclass(frozen=True)
class AnswersForecast:
    """Sampling answers to prompts of one length.

    Attributes:
        prompt: Tokens of a prompt.
        new: Tokens of an answer.
        rows: Answers side by side.
        memory: What they take on a GPU; `total` of it must be free.
        batches: By GPU, as many answers as fit it side by side (at most 64), the smallest first.
        seconds_gpu: The least time of 1,000 answers on a GPU of 3.2 TB/s, as its weights are read
            and tokens are chosen.
        seconds_cpu: The same on a CPU of 40 GB/s.
        disk: Bytes of `answers.h5` and of its shards' files for 1,000 answers.
    """

    prompt: int
    new: int
    rows: int
    memory: Components
    batches: dict[str, int]
    seconds_gpu: float
    seconds_cpu: float
    disk: int


def forecast_answers(
    target: str, precision: str | None, rows: int, prompt: int, new: int
) -> AnswersForecast:
    """Forecast memory, disk and time of sampling.

    Args:
        target: A profile, or a model.
        precision: Of the weights; None: the profile's.
        rows: Answers side by side.
        prompt: Tokens of a prompt.
        new: Tokens of an answer.

    Returns:
        Bytes of the memory, answers that fit each GPU, and seconds and bytes of 1000 answers.

    Raises:
        TheLoomError: The target or the precision is unknown or unsupported.
    """
    settings = forecast.settings_of(target)
    estimator = run_models.estimator_of(settings)
    kind = forecast.kind_of(settings, precision, estimator.own)
    size = answers_plan.size_of(estimator, kind, estimate.tied_head(settings), prompt, "cuda")
    batches = {}
    for gpu in gpu_specs.gpus():
        fitting = MOST
        free = forecast.HEADROOM * gpu.usable_bytes
        while fitting and size.components(fitting, prompt, new, "cuda").total > free:
            fitting //= 2
        if fitting and gpu.computes(kind.name):
            batches[gpu.name] = fitting
    return AnswersForecast(
        prompt,
        new,
        rows,
        size.components(rows, prompt, new, "cuda"),
        batches,
        size.seconds(1000 * new, rows, "cuda"),
        size.seconds(1000 * new, rows, "cpu"),
        disk.answers_bytes(settings, 1000, 1000 * (prompt + new), 1000 * new),
    )


def as_json(found: AnswersForecast) -> dict[str, object]:
    """The forecast as plain data.

    Args:
        found: The forecast.

    Returns:
        Numbers, texts and dicts by name, with the sums of the memory.
    """
    total = {"allocated": found.memory.allocated, "total": found.memory.total}
    return asdict(found) | {"memory": asdict(found.memory) | total}
