"""What can be known to be wrong before any job runs, in milliseconds and without torch."""

from theloom import config, corpus, hooks, source
from theloom.config import Run


def check(run: Run) -> None:
    """Files that are not there, and hook points that the profile's numbers rule out. Raises TheLoomError."""
    whole = config.typed(run.config)
    source.check_local(whole.model)
    corpus.check_local(whole.corpus)
    numbers = whole.model.architecture
    if numbers is not None:
        hooks.select(
            whole.memory.activation_cache_filter,
            hooks.catalogue(numbers.num_hidden_layers, numbers.hidden_size),
        )
