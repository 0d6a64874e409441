"""The load_model stage for a model that goes block by block: tried out, measured, and written to `model.h5`."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import h5py
import torch

from theloom import host, layout, malloc, memory, model, source, tokens
from theloom.errors import MemoryPlanError
from theloom.estimate import Estimate
from theloom.hooks import HookPoint
from theloom.layerwise import LayerwiseRunner
from theloom.layerwise_model import LayerwiseModel, opened
from theloom.layerwise_plan import LayerwisePlan, need
from theloom.peak import PeakMemory
from theloom.residual_store import ResidualStore
from theloom.schema import Config

log = logging.getLogger(__name__)

MEASURED_BLOCKS = 3  # the two buffers and all that is done but once have been seen by then


@dataclass(frozen=True)
class SweptPeak:
    """A sweep over one largest batch: bytes foretold, and by how much memory in use grew; `files`: pages of files."""

    foretold: int
    growth: int
    files: int


def record(config: Config, estimated: Estimate, tokens_path: Path, output: Path, why: str = "") -> None:
    """Write `model.h5`. `why`: what speaks against a resident model, in words, for the message where this fails too.

    Raises ModelError, HookError, MemoryPlanError.
    """
    from theloom import model_record

    files = source.prepare(config.model)
    model.before_counting(config.model)
    before = host.resident()  # from where a job's growth is counted (`layerwise_shard`)
    with opened(config, files) as found:
        points = found.loaded.catalogue.select(estimated.hooks)
        threshold = config.memory.memory_warning_threshold
        try:
            planned = found.fit(estimated, points, tokens.window_lengths(tokens_path), threshold, 0)
        except MemoryPlanError as error:
            raise MemoryPlanError(f"{why}; and {error}" if why else str(error)) from None
        said = memory.in_words(planned.need.device if found.loaded.device.type == "cuda" else planned.need.cpu)
        log.info("block by block: batches of %d tokens, %s", planned.plan.batch_tokens, said)
        for change in planned.changes:
            log.warning("to fit: %s", change)
        tried = found.try_out()
        measured = measure(found, planned, points, before)
        foretold, grown = memory.in_words(measured.foretold), memory.in_words(measured.growth)
        log.info("a sweep over the largest batch: %s foretold, %s found", foretold, grown)
        beside = max(0, measured.growth - measured.foretold)
        with h5py.File(output, "w") as file:
            attributes = model_record._attributes(found.loaded, config)
            layout.set_attributes(file, attributes | asdict(tried) | {"execution": "layerwise"})
            group = file.create_group("memory")
            layout.set_attributes(group, {"changes": list(planned.changes), "ratio": 1.0, "beside": beside})
            layout.set_attributes(group.create_group("plan"), asdict(planned.plan) | {"spilled": planned.spilled})
            predicted = asdict(planned.need) | {"device": planned.need.device, "host": planned.need.host}
            layout.set_attributes(group.create_group("predicted"), predicted)
            layout.set_attributes(group.create_group("sizes"), asdict(found.sizes(points)))
            layout.set_attributes(group.create_group("measured"), asdict(measured))
            model_record._write_catalogue(file, found.loaded.catalogue)


def measure(
    found: LayerwiseModel, planned: LayerwisePlan, points: Sequence[HookPoint], before: int | None = None
) -> SweptPeak:
    """Sweep one largest batch of random tokens through the first blocks, and see by how much memory grows.

    `before`: the bytes that this process held before the model was opened, from where growth counts on the CPU.
    """
    blocks = min(MEASURED_BLOCKS, len(found.shell.blocks))
    last = found.loaded.catalogue.select([f"blocks.{blocks - 1}.hook_resid_post"])
    vocabulary = found.shell.model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    precision, device = found.loaded.precision.resolved, found.loaded.device
    chosen = max(planned.plan.passes, key=lambda w: w.windows * w.tokens)
    ids = torch.randint(vocabulary, (chosen.windows, chosen.tokens), generator=generator)
    runner = LayerwiseRunner(found.shell, found.source, last, planned.plan.chunk_size, precision)
    spec = runner.residuals([ids], "")
    found.source.release()
    malloc.give_back()  # what trying it out has left
    with PeakMemory(device) as growing, ResidualStore(spec, None) as store:
        runner.sweep([ids], store, lambda *_: None)
    sizes, pass_of, row = found.sizes(last), found.pass_of(last), found.residual_row
    expected = need(sizes, pass_of, [chosen], spec.nbytes, row, device.type, False)
    foretold = expected.buffers + expected.kept + expected.working_set
    if device.type == "cpu":
        foretold = expected.cpu - expected.writer  # which is not in this sweep
    growth = growing.growth
    if device.type == "cpu" and before is not None:  # as the job will, whose heap has what opening left in it
        growth += growing.before - before
    return SweptPeak(foretold, growth, growing.files)
