"""Image models in stages, where a run or a command names none of their hook points."""

from collections.abc import Sequence

from theloom.config.auto import traceable_attention
from theloom.config.frozen import to_config, to_plain
from theloom.config.schema import Config
from theloom.errors import HookError, ModelError
from theloom.hooks.points import RESIDUALS, HookCatalog, HookPoint
from theloom.hooks.stages.resolution import listed_stages
from theloom.memory.estimators import Traced
from theloom.model.files import hf_config

EVERY = ("stages.*.hook_out",)


def with_stages(config: Config, stages: Sequence[str] = EVERY) -> Config:
    """The same config for a model that is read by its stages.

    Args:
        config: the run's config.
        stages: the hook filter that names them.

    Returns:
        A copy.
    """
    plain = to_plain(config)
    return to_config(plain | {"model": plain["model"] | {"stages": list(stages)}})


def as_it_is_built(config: Config) -> Config:
    """The same config for a model of images whose blocks are in stages.

    Args:
        config: the run's config, as `estimate.as_it_reads` gives it.

    Returns:
        A copy where the model has stages and its blocks are not one stream; else the config itself.
    """
    if not _of_images(config) or config.model.stages:
        return config
    try:
        points = _catalog(config).points
    except (ModelError, HookError):
        points = []
    if any(p.value == RESIDUALS[1] for p in points) or not points_in(config):
        return config
    return with_stages(config)


def instead(config: Config, error: ModelError | HookError) -> ModelError | HookError:
    """What to say of a model whose blocks cannot be read, where it has stages that can.

    Args:
        config: the run's config.
        error: what was raised at its hook points.

    Returns:
        An error that lists them; the same error where there are none, or where they are the blocks.
    """
    if not _of_images(config) or config.model.stages:
        return error
    try:
        points = _catalog(with_stages(config)).points
    except (ModelError, HookError) as other:
        of_model = isinstance(error, ModelError)  # not of a name in the filter
        return ModelError(f"{error}; nor by stages: {other}") if of_model else error
    blocks_alone = isinstance(error, HookError) and len({(p.rows, p.shape) for p in points}) < 2
    if blocks_alone:
        return error
    return ModelError(
        f"model.source: {config.model.source} is built in stages, whose hook points are "
        f"{listed_stages(points)}; name some of one number of rows, as "
        f"memory.activation_cache_filter=[{points[-1].name}]"
    )


def _of_images(config: Config) -> bool:
    modality = config.model.modality
    return modality is not None and modality.name == "images"


def points_in(config: Config) -> list[HookPoint]:
    """The hook points of a model's stages.

    Args:
        config: the run's config, of a model of images.

    Returns:
        In the order of the model's own hidden states; none where it is not read by stages.
    """
    try:
        return _catalog(with_stages(config)).points
    except (ModelError, HookError):
        return []


def _catalog(config: Config) -> HookCatalog:
    attention = traceable_attention(config.extraction.attention.name)
    return Traced(hf_config(config.model), attention, config.model.trust_remote_code).catalog()
