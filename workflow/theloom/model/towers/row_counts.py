"""How many rows a tower makes of an input: the rows that its first block is given, on tensors
without bytes.
"""

from functools import cached_property
from typing import TYPE_CHECKING, Any

from theloom.config.model_dims import stages_of
from theloom.hooks.blocks import cannot_run
from theloom.hooks.failures import refused
from theloom.hooks.points import RESIDUALS, HookPoint, check_one_resolution
from theloom.hooks.taps import Taps
from theloom.model.shapes_only import shapes_only
from theloom.model.towers import classes as towers
from theloom.rows.modality import modality_of

if TYPE_CHECKING:
    from theloom.model.fake import FakeModel


class RowCounts:
    """Rows of a tower by the shape of its input.

    Args:
        fake: the tower.
    """

    def __init__(self, fake: "FakeModel") -> None:
        self._fake = fake
        self._known: dict[tuple[int, ...], set[int]] = {}

    @property
    def _model(self) -> Any:
        return self._fake.architecture.model

    @property
    def input_name(self) -> str:
        """What the model calls its input."""
        return str(self._model.main_input_name)

    @property
    def channels(self) -> int:
        """Channels of an image, as the model's config has them."""
        return int(getattr(self._model.config, "num_channels", None) or 3)

    @property
    def of_its_own_size(self) -> int:
        """Rows of an input of the size that the model has by its config or its processor."""
        return self.rows(towers.shape_of(self._model, 0))

    @property
    def longest(self) -> int:
        """Rows of the largest document that a run is planned for where its config names no number:
        of an image of the model's own size, or of a clip of 30 seconds.
        """
        return max(self._counts(towers.longest_shape(self._model)))

    def rows(self, shape: tuple[int, ...]) -> int:
        """The rows of one document.

        Args:
            shape: of what the processor made of it.

        Returns:
            Their number.

        Raises:
            ModelError: the model takes no input of this shape.
            HookError: its hook points in stages have different numbers of rows.
        """
        counts = self._counts(shape)
        if len(counts) > 1:
            check_one_resolution(self._points)
        return max(counts)

    def _counts(self, shape: tuple[int, ...]) -> set[int]:
        if shape not in self._known:
            self._known[shape] = self._count(shape)
        return self._known[shape]

    @cached_property
    def _points(self) -> list[HookPoint]:
        """The hook points by which rows are counted: all that are read of a model in stages, else
        what the first block is given.
        """
        architecture = self._fake.architecture
        if architecture.stages is not None:
            return architecture.stages.catalog.select(stages_of(self._model.config))
        return [p for p in architecture.stream if p.block == 0 and p.value == RESIDUALS[0]]

    def _count(self, shape: tuple[int, ...]) -> set[int]:
        import torch

        found: list[torch.Tensor] = []
        taps = Taps(self._fake.architecture, self._points, lambda _, value: found.append(value))
        with self._fake.mode, shapes_only(), refused(cannot_run(self._model)), taps:
            value = torch.zeros(1, *shape)
            taps.run(**{self.input_name: value})
        return {int(value.shape[1]) for value in found}

    @cached_property
    def _patch(self) -> tuple[int, int] | None:
        return towers.patch_size(self._model)

    def before_patches(self, shape: tuple[int, ...]) -> int | None:
        """Rows that stand before those of the patches: class token, registers.

        Args:
            shape: of an image, (channels, height, width).

        Returns:
            Their number; None where the rows are not these and one for each patch.
        """
        in_stages = self._fake.architecture.stages is not None
        if modality_of(self._model.config) != "images" or in_stages or self._patch is None:
            return None
        patches = (shape[1] // self._patch[0]) * (shape[2] // self._patch[1])
        before = towers.rows_before(self._model)
        return before if self.rows(shape) == before + patches else None
