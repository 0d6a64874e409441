"""Checks before any job runs: mistakes that show in milliseconds, without torch."""

from theloom.config import frozen, model_dims
from theloom.config.compose import Run
from theloom.corpus import documents
from theloom.hooks import points
from theloom.memory import closed_form
from theloom.model import files


def check(run: Run) -> None:
    """Check that a run's files exist, and its hook points where the profile has the numbers.

    Args:
        run: The run as it was composed.

    Raises:
        TheLoomError: A file is missing, or a hook point cannot exist.
    """
    whole = frozen.to_config(run.config)
    files.check_local(whole.model)
    documents.check_local(whole.corpus)
    declared, filters = whole.model.architecture, whole.memory.activation_cache_filter
    size = model_dims.dims_of_profile(declared) if declared is not None else None
    if size is not None and closed_form.covers(size):
        points.llama_catalog(size).select(filters)
    else:
        points.check_names(filters)
