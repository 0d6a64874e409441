"""What a GPU's allocator is predicted to hold for a run: its rules, replayed over the traces of the
plan's passes.
"""

from collections.abc import Sequence

from theloom.hooks.points import HookPoint
from theloom.memory import trace
from theloom.memory.caching_allocator import Usage, in_turn, replay
from theloom.memory.cuda_allocator import SMALL, Event
from theloom.memory.sizes import BlockSizes, Workload
from theloom.memory.trace_block import trace_block
from theloom.model import pruning
from theloom.model.fake import FakeModel
from theloom.store.ring_buffer import IN_FLIGHT

UNTRACED = SMALL  # bytes that no trace sees: token ids, tables, the loss of a rounded request
MOST_STEPS = 16  # of a window, each of which is traced; of longer ones the last two


def resident(
    fake: FakeModel,
    passes: Sequence[Workload],
    points: Sequence[HookPoint],
    store: str,
    left_out: Sequence[str] = (),
    fixed: Sequence[int] = (),
    expandable: bool = False,
    of_window: int | None = None,
) -> Usage:
    """Predict the peaks of a model that is on a GPU as a whole.

    Args:
        fake: the model without storage.
        passes: the shapes of its passes, in their order.
        points: hook points that are written.
        store: the precision on disk.
        left_out: names of modules that are not loaded.
        fixed: bytes of what else stays, such as the cuBLAS workspace.
        expandable: segments grow.
        of_window: the most rows that are kept of a window; None: all of them.

    Returns:
        The peaks, in bytes.
    """
    traced = [
        trace.trace(
            fake,
            workload,
            points,
            store=store,
            device="cuda",
            on_their_way=IN_FLIGHT,
            of_window=of_window,
            shorten=len(workload.steps) > MOST_STEPS,
        )[1].events
        for workload in passes
    ]
    weights = pruning.storages(fake.model, left_out)
    return replay(weights, _after(fixed, traced), warmed_up=True, expandable=expandable)


def layerwise(
    fake: FakeModel,
    sizes: BlockSizes,
    passes: Sequence[Workload],
    points: Sequence[HookPoint],
    largest: int,
    residual_row: int,
    fixed: Sequence[int] = (),
    expandable: bool = False,
) -> Usage:
    """Predict the peaks of a model that goes through a GPU layer by layer: two blocks, residuals
    and rows on their way, and one pass after the other.

    Args:
        fake: the model without storage.
        sizes: of its blocks.
        passes: the shapes of a block's passes, in their order.
        points: hook points that are written.
        largest: bytes of the largest value on its way to the host.
        residual_row: bytes of a token's residual.
        fixed: bytes of what else stays, such as the cuBLAS workspace.
        expandable: segments grow.

    Returns:
        The peaks, in bytes.
    """
    step = max(w.windows * min(w.tokens, w.chunk_size) for w in passes)
    moving = [step * residual_row] * (1 + IN_FLIGHT) + [largest] * IN_FLIGHT
    blocks = [sizes.block] * 2 + [sizes.converted] + [sizes.kept]
    traced = [e for w in passes for e in trace_block(fake, w, points, "cuda").events]
    return replay([*blocks, *moving], _after(fixed, traced), expandable=expandable)


def _after(fixed: Sequence[int], passes: Sequence[Sequence[Event]]) -> list[Event]:
    """The events of passes after the births of what stays, of which no trace knows."""
    held = [(-number, nbytes) for number, nbytes in enumerate((*fixed, UNTRACED), 1) if nbytes]
    return [*held, *in_turn(passes)]
