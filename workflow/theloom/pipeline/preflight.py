"""What can be known to be wrong before any job runs, in milliseconds and without torch."""

from theloom.config import frozen, model_dims
from theloom.config.compose import Run
from theloom.corpus import documents
from theloom.hooks import points
from theloom.memory import closed_form
from theloom.model import files


def check(run: Run) -> None:
    """Files that are not there, and hook points that the profile's numbers rule out. Raises
    TheLoomError.
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
