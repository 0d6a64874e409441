"""How many rows a tower makes of an input: the rows that its first block is given, on tensors
without bytes; of an encoder before a decoder, the rows that the decoder attends to.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from theloom.config.model_dims import stages_of
from theloom.errors import ModelError
from theloom.hooks.failures import refused
from theloom.hooks.layouts.trial import cannot_run
from theloom.hooks.points import RESIDUALS, HookPoint
from theloom.hooks.stages.resolution import check_one_resolution
from theloom.hooks.taps import Taps
from theloom.model.towers import trial_inputs as towers
from theloom.model.without_bytes.shapes_only import shapes_only
from theloom.rows.modality import modality_of, source_of
from theloom.rows.tower_inputs import part_of

if TYPE_CHECKING:
    import torch

    from theloom.model.fake import FakeModel


class RowCounts:
    """Rows of a tower by the shape of its input.

    Args:
        fake: the tower, or the decoder behind it.
    """

    def __init__(self, fake: "FakeModel") -> None:
        # found here: it takes a pass, which is none within a pass that counts rows
        self._fake, self._architecture = fake, fake.architecture
        self._known: dict[Any, set[int]] = {}

    @property
    def _model(self) -> Any:
        return self._fake.model

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
        return self.rows(towers.trial_inputs(self._model, 1, 0))

    @property
    def longest(self) -> int:
        """Rows of the largest document that a run is planned for where its config names no number:
        of an image of the model's own size, or of a clip of 30 seconds.
        """
        return max(self._counts(towers.longest_inputs(self._model)))

    def check_trial(self, rows: int) -> None:
        """Check that inputs of a trial have the rows that they shall have: by them memory is
        predicted.

        Args:
            rows: of the longest document.

        Raises:
            ModelError: they have fewer.
        """
        found = self.rows(towers.trial_inputs(self._model, 1, rows))
        if found < rows:
            raise ModelError(
                f"{self._model.config.model_type}: TheLoom does not know which clips have as many "
                f"as {rows:,} rows (it gets {found:,}), so memory cannot be planned; read the "
                "decoder of another model"
            )

    def rows(self, inputs: "Mapping[str, torch.Tensor]") -> int:
        """The rows of one document.

        Args:
            inputs: what the processor made of it.

        Returns:
            Their number.

        Raises:
            ModelError: the model takes no input of this shape.
            HookError: its hook points in stages have different numbers of rows.
        """
        counts = self._counts(inputs)
        if len(counts) > 1:
            check_one_resolution(self._points)
        return max(counts)

    def _counts(self, inputs: "Mapping[str, torch.Tensor]") -> set[int]:
        key = tuple(part_of(name, value) for name, value in inputs.items())
        if key not in self._known:
            self._known[key] = self._count(inputs)
        return self._known[key]

    @cached_property
    def _points(self) -> list[HookPoint]:
        """The hook points by which rows are counted: all that are read of a model in stages, else
        what the first block is given.
        """
        architecture = self._architecture
        if architecture.stages is not None:
            return architecture.stages.catalog.select(stages_of(self._model.config))
        return [p for p in architecture.stream if p.block == 0 and p.value == RESIDUALS[0]]

    def _count(self, inputs: "Mapping[str, torch.Tensor]") -> set[int]:
        import torch

        known = any(not value.is_floating_point() for value in inputs.values())
        with self._fake.mode, shapes_only(known), refused(cannot_run(self._model)):
            given = {
                name: torch.zeros(value.shape) if value.is_floating_point() else value
                for name, value in inputs.items()
            }
            if source_of(self._model.config):
                return {int(self._model.encoder(**given).last_hidden_state.shape[1])}
            return self._rows_seen(given)

    def _rows_seen(self, given: "Mapping[str, torch.Tensor]") -> set[int]:
        found: list[int] = []
        taps = Taps(
            self._architecture,
            self._points,
            lambda _, value: found.append(int(value.shape[1])),
        )
        with taps:
            taps.run(**given)
        return set(found)

    @property
    def in_time(self) -> bool:
        """Whether the rows of a clip are its frames, one after the other."""
        return self.input_name != "input_values" and not towers.patch_size(self._model)

    def real_rows(self, inputs: "Mapping[str, torch.Tensor]") -> int | None:
        """Rows of a document that are not of padding, by the mask that the processor makes.

        Args:
            inputs: what the processor made of it.

        Returns:
            Their number, the first ones; None where there is no mask, or it does not tell.
        """
        mask = next((v for name, v in inputs.items() if "mask" in name), None)
        if mask is None:
            return None
        rows, real = self.rows(inputs), int(mask.sum())
        if mask.shape[-1] == rows:
            return real
        if towers.rows_of_frames(self._model, mask.shape[-1]) != rows:
            return None
        return min(rows, towers.rows_of_frames(self._model, real))

    @cached_property
    def _patch(self) -> tuple[int, int] | None:
        return towers.patch_size(self._model)

    def before_patches(self, inputs: "Mapping[str, torch.Tensor]") -> int | None:
        """Rows that stand before those of the patches: class token, registers.

        Args:
            inputs: what the processor made of an image.

        Returns:
            Their number; None where the rows are not these and one for each patch.
        """
        shape = tuple(inputs[self.input_name].shape[1:])
        in_stages = self._architecture.stages is not None
        images = modality_of(self._model.config) == "images" and not in_stages
        if not images or self._patch is None or len(shape) != 3:
            return None
        patches = (shape[1] // self._patch[0]) * (shape[2] // self._patch[1])
        before = towers.rows_before(self._model)
        return before if self.rows(inputs) == before + patches else None
