"""A model opened to be run layer by layer: shell, source of blocks, what they take, and a trial on
a few tokens.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from theloom.config.auto import traceable_attention
from theloom.config.schema import Config
from theloom.corpus.batching import Lengths
from theloom.devices import gpu, host
from theloom.devices.peak_memory import PeakMemory
from theloom.engine.layerwise import quantize, skeleton
from theloom.engine.layerwise.block_loader import BlockSource
from theloom.engine.layerwise.residual_store import ResidualStore
from theloom.engine.layerwise.runner import LayerwiseRunner
from theloom.engine.layerwise.skeleton import Shell
from theloom.engine.layerwise.weights_index import OUTSIDE
from theloom.errors import ModelError
from theloom.hooks.points import HookPoint, deepest_block, residual_points
from theloom.memory.sizes import BlockSizes, PeakBytes, Workload
from theloom.memory.trace_block import trace_block
from theloom.model import checks, loading, weight_format
from theloom.model.adapters.merging import MergedAdapters
from theloom.model.checks import SelfCheck
from theloom.model.fake import FakeModel, fake_model
from theloom.model.files import ModelFiles, hf_config
from theloom.model.length_switches import length_switches
from theloom.model.loading import LoadedModel, Target
from theloom.model.quantization import check_runs_on_the_cpu
from theloom.model.weight_format import WeightFormat
from theloom.planning import layerwise_plan, plan
from theloom.planning.estimates.estimate_file import Estimate
from theloom.planning.layerwise_plan import LayerwisePlan, PassOf, need
from theloom.planning.plan import Plan, max_batch_tokens

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerwiseModel:
    """A model without the weights of its blocks (`loaded`), and where these come from."""

    loaded: LoadedModel
    shell: Shell
    source: BlockSource

    def sizes(self, points: Sequence[HookPoint]) -> BlockSizes:
        """Bytes of the weights that a sweep reads and holds.

        Args:
            points: The hook points; the sweep ends at the deepest of their blocks.

        Returns:
            Bytes of the largest block, of what stays, and of all that is read.
        """
        checkpoint = self.shell.checkpoint
        blocks = range(min(deepest_block(points) + 1, len(self.shell.blocks)))
        embeddings = sum(checkpoint.stored[k].nbytes for k in self.shell.mapped)
        if checkpoint.quantized:
            device, block = (
                self.loaded.device.type,
                max((checkpoint.held(b) for b in blocks), default=0),
            )
            return BlockSizes(
                block=block,
                converted=max(
                    0, max((checkpoint.arriving(b, device) for b in blocks), default=0) - block
                ),
                kept=checkpoint.held(OUTSIDE, self.shell.mapped),
                embeddings=embeddings,
                read=sum(checkpoint.nbytes(b) for b in blocks),
                tensor=max((checkpoint.largest_on_host(b) for b in blocks), default=0),
            )
        merging = checkpoint.adapters or MergedAdapters()
        converted = max((checkpoint.converted_bytes(block) for block in blocks), default=0)
        return BlockSizes(
            block=self.source.largest if blocks else 0,
            converted=converted + merging.working,
            kept=checkpoint.nbytes(OUTSIDE) - embeddings + merging.held,
            embeddings=embeddings,
            read=sum(checkpoint.nbytes(block) for block in blocks),
        )

    def pass_of(self, points: Sequence[HookPoint]) -> PassOf:
        """Predicts the bytes of one pass through one block: by a trace, each workload once.

        Args:
            points: The hook points, whose values are written as they come.

        Returns:
            A function of a workload, which gives the bytes at the peak and those of the arguments
            of all blocks.
        """
        fake, device = self.fake(), self.loaded.device.type

        def predicted(workload: Workload) -> tuple[PeakBytes, int]:
            def found() -> tuple[PeakBytes, int]:
                traced = trace_block(fake, workload, points, device)
                return traced.parts, traced.recorded

            return fake.remembered(("block", workload, tuple(points), device), found)

        return predicted

    def fake(self) -> FakeModel:
        """The model without bytes, to be traced.

        Returns:
            A new one, of the same config and weight format.
        """
        return fake_model(
            self.shell.model.config,
            self.kind.precision,
            self.kind.quantization,
            traceable_attention(self.loaded.attention),
            kernels="cpu" if self.loaded.device.type == "cpu" else "cuda",
        )

    @property
    def kind(self) -> WeightFormat:
        """How its weights are held."""
        return weight_format.weight_format_as(
            self.loaded.precision.resolved, self.loaded.quantization
        )

    @property
    def residual_row(self) -> int:
        """Bytes of one token's residual."""
        return self.shell.architecture.hidden_size * self.shell.residual_dtype.itemsize

    def fit(
        self,
        estimated: Estimate,
        points: Sequence[HookPoint],
        windows: Lengths,
        threshold: float,
        overhead: int,
        streams: bool = True,
    ) -> LayerwisePlan:
        """The plan for the largest shard of a corpus, or for one alone.

        Args:
            estimated: The run's estimate, with what the config requests.
            points: The hook points to read.
            windows: Lengths of the windows in tokens, shard by shard.
            threshold: Share of the device's and of the host's memory that may be in use.
            overhead: Bytes that a process was measured to take beyond the prediction.
            streams: Long documents may go in chunks.

        Returns:
            The plan, with its bytes and what was changed for it to fit.

        Raises:
            MemoryPlanError: Nothing fits.
        """
        device = self.loaded.device.type
        memory, _ = gpu.available_memory(self.loaded.device)
        longest = min(windows.longest, estimated.context_length)
        requested = Plan(
            estimated.batch_tokens or max_batch_tokens(device),
            plan.chunk_of(estimated.chunk_size, longest, streams),
            longest,
        )
        row = self.residual_row
        sizes, pass_of = self.sizes(points), self.pass_of(points)
        return layerwise_plan.choose(
            sizes,
            pass_of,
            requested,
            windows.tokens * row,
            row,
            device,
            memory,
            host.memory(),
            threshold=threshold,
            overhead=overhead,
            windows=windows,
            one_pass=plan.one_pass_is_less(estimated, self.kind.name, requested),
            streams=streams,
            row_bytes=estimated.largest_capture[self.kind.name],
            of_window=estimated.kept_of_window,
            capability=gpu.compute_capability(self.loaded.device),
        )

    def self_check(self) -> SelfCheck:
        """`checks.self_check`, in one sweep, but for the model's own hidden states, which take all
        of it at once.

        Returns:
            What the model was seen to do; `states_error` is NaN.

        Raises:
            ModelError: A row depends on what else is in the batch.
        """
        points = residual_points(len(self.shell.blocks), self.shell.architecture.hidden_size)
        ids = checks.tokens_of(self.shell.model)
        batches, chunk_sizes = [ids[:1], ids[1:, :16], checks.padded(ids), ids[:1]], [24, 24, 24, 7]
        count = 4 if self.shell.streams else 3
        rows_of: list[dict[str, list[torch.Tensor]]] = [
            {p.name: [] for p in points} for _ in range(count)
        ]
        runner = LayerwiseRunner(self.shell, self.source, points, 24, "fp32")
        with ResidualStore(
            runner.residuals(batches[:count], "", chunk_sizes[:count]),
            None,
            device=self.loaded.device,
        ) as store:
            runner.sweep(
                batches[:count],
                store,
                lambda batch, name, start, rows, first: rows_of[batch][name].append(rows.cpu()),
                chunk_sizes=chunk_sizes[:count],
            )
        whole, second, both, *chunked = [
            {n: torch.cat(c, dim=1) for n, c in by_name.items()} for by_name in rows_of
        ]
        name, limit = type(self.shell.model).__name__, 10 * self.loaded.tolerance
        padding = checks.side_by_side(whole, second, both)
        if not padding <= limit:
            raise ModelError(
                f"{name}: a token's hidden state depends on what else is in the batch (by "
                f"{padding:.2g} of the largest "
                "value); layer by layer there is no padding mask: set extraction.execution=resident"
            )
        chunks = checks.largest_error(whole, chunked[0]) if chunked else math.inf
        reason = (
            ""
            if chunks <= limit
            else checks.other_in_chunks(chunks)
            if chunked
            else "it does not take a KV cache"
        )
        if reason:
            log.warning("%s cannot be streamed: %s", name, reason)
        switches = length_switches(self.shell.model.config)
        up_to = checks.streams_up_to(self.shell.model, switches)
        alone = checks.picks_keys(self.shell.architecture)
        return SelfCheck(
            math.nan, padding, chunks, True, not reason, reason, switches, up_to, alone
        )


@contextmanager
def opened(
    config: Config, files: ModelFiles, exact: str | None = None, target: Target | None = None
) -> Iterator[LayerwiseModel]:
    """Open the model of a config, to run it layer by layer.

    Args:
        config: The run's config.
        files: The model's files.
        exact: In this precision, fp32 or fp64, and not quantized, whatever the config requests.
        target: The device and the precision, if they are resolved already.

    Yields:
        The model, as long as its files are open.

    Raises:
        ModelError: The model cannot be run layer by layer.
    """
    if not list(files.folder.glob("*.safetensors")):
        raise ModelError(
            f"model.source: {config.model.source} has no safetensors, which layer by layer are "
            "needed"
        )
    device, resolved = target or loading.resolve_precision(config, exact)
    attention = config.extraction.attention.name
    model_config = hf_config(config.model)
    bits = weight_format.quantization_of(
        config, model_config
    ) or weight_format.requested_quantization(config)
    if exact:
        bits = None
    if bits is not None and files.adapters:
        raise ModelError(
            f"model.adapter: {files.adapters[0].source} is not merged into weights of {bits} layer "
            "by layer; set memory.quantization=null, or extraction.execution=resident"
        )
    shell = Shell(
        Path(files.folder),
        model_config,
        resolved.resolved,
        device,
        None if attention == "auto" else attention,
        config.model.trust_remote_code,
        None if bits is None else quantize.quantizer(bits, model_config, resolved.resolved),
        files.adapters,
    )
    loading.let_experts_run(shell.model, resolved.resolved)
    if bits == "4bit" and device.type == "cpu":
        check_runs_on_the_cpu(shell.model)
    implementation = str(shell.model.config._attn_implementation)
    adapters = shell.checkpoint.adapters
    loaded = LoadedModel(
        shell.architecture,
        files,
        device,
        resolved,
        implementation,
        bits,
        ignored=() if adapters is None else tuple(adapters.ignored),
    )
    with BlockSource(shell.checkpoint, device, len(shell.blocks)) as source:
        skeleton.examine(shell, source)
        yield LayerwiseModel(loaded, shell, source)


MEASURED_BLOCKS = 3  # the two buffers and all that is done but once have been seen by then


@dataclass(frozen=True)
class SweptPeak:
    """A sweep over one largest batch: bytes predicted, and by how much memory in use grew; `files`:
    pages of files.
    """

    predicted: int
    growth: int
    files: int


def measure_sweep(
    model: LayerwiseModel,
    planned: LayerwisePlan,
    before: int | None = None,
) -> SweptPeak:
    """Sweep one largest batch of random tokens through the first blocks, and see by how much memory
    grows.

    Args:
        model: The open model.
        planned: The plan, whose largest pass is run. The sweep reads the output of its last block
            alone.
        before: Bytes that this process held before the model was opened, from where growth counts
            on the CPU; None: from the start of the sweep.

    Returns:
        Bytes predicted and measured.
    """
    blocks = min(MEASURED_BLOCKS, len(model.shell.blocks))
    last = model.loaded.catalog.select([f"blocks.{blocks - 1}.hook_resid_post"])
    vocabulary = model.shell.model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    precision, device = model.loaded.precision.resolved, model.loaded.device
    chosen = max(planned.plan.passes, key=lambda w: w.windows * w.tokens)
    ids = torch.randint(vocabulary, (chosen.windows, chosen.tokens), generator=generator)
    runner = LayerwiseRunner(model.shell, model.source, last, planned.plan.chunk_size, precision)
    spec = runner.residuals([ids], "")
    model.source.release()
    host.release_free_heap()  # what trying it out has left
    with PeakMemory(device) as growing, ResidualStore(spec, None, device=device) as store:
        runner.sweep([ids], store, lambda *_: None)
    sizes, pass_of, row = model.sizes(last), model.pass_of(last), model.residual_row
    expected = need(sizes, pass_of, [chosen], spec.nbytes, row, device.type, False)
    predicted = expected.buffers + expected.kept + expected.working_set
    if device.type == "cpu":
        predicted = expected.cpu - expected.writer  # which is not in this sweep
    growth = growing.growth
    if (
        device.type == "cpu" and before is not None
    ):  # as the job will, whose heap has what opening left in it
        growth += growing.before - before
    return SweptPeak(predicted, growth, growing.files)
