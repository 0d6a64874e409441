"""What can be known to be wrong before any job runs, in milliseconds and without torch."""

from theloom import architecture, closed_form, config, corpus, hooks, source
from theloom.config import Run


def check(run: Run) -> None:
    """Files that are not there, and hook points that the profile's numbers rule out. Raises TheLoomError."""
    whole = config.typed(run.config)
    source.check_local(whole.model)
    corpus.check_local(whole.corpus)
    declared, filters = whole.model.architecture, whole.memory.activation_cache_filter
    size = architecture.numbers_of_profile(declared) if declared is not None else None
    if size is not None and closed_form.covers(size):
        hooks.of_llama(size).select(filters)
    else:
        hooks.check_names(filters)
