"""Where the images or clips of a run are: files, or a data set of the hub."""

from collections.abc import Iterator

from theloom.config.schema import CorpusConfig
from theloom.corpus.media import data_sets, items
from theloom.corpus.media.items import Item


def read(config: CorpusConfig) -> Iterator[Item]:
    """The images or clips of a corpus, in its order.

    Args:
        config: the `corpus` settings.

    Returns:
        One entry for each document.

    Raises:
        CorpusError: they cannot be read.
    """
    return (items if config.dataset is None else data_sets).read(config)


def store(config: CorpusConfig) -> items.Store | data_sets.Store:
    """What reads the bytes of images or clips again.

    Args:
        config: the `corpus` settings.

    Returns:
        It gives the bytes by the names of items.
    """
    return (items if config.dataset is None else data_sets).Store(config)
