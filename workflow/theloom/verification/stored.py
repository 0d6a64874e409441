"""What a file stores of a model's values: its windows' rows, or one that is pooled over them."""

from typing import TYPE_CHECKING

import numpy as np

from theloom.dataset.activations import Activations
from theloom.hooks.points import HookPoint

if TYPE_CHECKING:
    import torch

Unit = tuple[int, slice, "torch.Tensor"]


class StoredRows:
    """Makes the rows that a file should have from the values of whole windows.

    Args:
        acts: The file.
    """

    def __init__(self, acts: Activations) -> None:
        self._acts = acts
        self._waiting: dict[tuple[int, str], dict[int, torch.Tensor]] = {}

    def of(self, window: int, point: HookPoint, values: "torch.Tensor") -> Unit | None:
        """The rows of a window, or of its document where they are pooled.

        Args:
            window: Its number.
            point: The hook point.
            values: Of all its tokens, (position, …).

        Returns:
            The number of the window, or of the document's last one; the stored rows; what they
            should be, in FP64 where they are added up. None until all windows of a document that is
            pooled were there.
        """
        acts = self._acts
        kept = acts.kept_positions(window)
        if kept is not None:
            values = values[_index(kept, values)]
        if not acts.pooled:
            return window, slice(*(int(r) for r in acts.window_offset[window : window + 2])), values
        document = int(acts.window_document[window])
        whole = np.flatnonzero(acts.window_document == document).tolist()
        there = self._waiting.setdefault((document, point.name), {})
        there[window] = values
        if len(there) < len(whole):
            return None
        del self._waiting[document, point.name]
        rows = slice(*(int(r) for r in acts.document_offset[document : document + 2]))
        groups = np.concatenate([acts.rows_of_kept(w) for w in whole]) - rows.start
        together = [there[w] for w in whole]
        return whole[-1], rows, _pooled(acts.pool, together, groups, rows.stop - rows.start)


def _pooled(
    pool: str, parts: "list[torch.Tensor]", groups: np.ndarray, rows: int
) -> "torch.Tensor":
    """Rows that tokens are pooled to; `groups` has the row of each."""
    import torch

    values = torch.cat(parts)
    if pool in ("first", "last"):
        return values
    values = values.double() if values.device.type != "mps" else values.cpu().double()
    by_row = [values[_index(np.flatnonzero(groups == row), values)] for row in range(rows)]
    if pool == "max":
        return torch.stack([v.amax(0) for v in by_row])
    return torch.stack([v.mean(0) if pool == "mean" else v.sum(0) for v in by_row])


def _index(numbers: np.ndarray, values: "torch.Tensor") -> "torch.Tensor":
    import torch

    return torch.from_numpy(numbers).to(values.device)
