"""Fetch a run's model and data set once, before its jobs, which then run without the hub and
without its token.
"""

import json
import logging
from pathlib import Path

from theloom.config.schema import Config
from theloom.corpus import documents
from theloom.model import files

log = logging.getLogger(__name__)


def stage(config: Config, output: Path) -> None:
    """Have the files of a model, its tokenizer and a hub's data set here; write which they are to a
    JSON file.

    The hub's own login is used (`hf auth login`, or HF_TOKEN), and never written.

    Args:
        config: The config of the stage.
        output: Path of the JSON file.

    Raises:
        ModelError: The model's files are missing or broken, or cannot be fetched.
        CorpusError: The data set is missing or broken, or has no such split.
    """
    revision = files.fetch(config.model)
    if config.corpus.dataset is not None:
        documents.fetch(config.corpus)
        how = "is read as it comes" if config.corpus.streaming else "is here"
        log.info("corpus.dataset: %s %s", config.corpus.dataset, how)
    log.info(
        "model.source: %s is here%s", config.model.source, f", at {revision}" if revision else ""
    )
    record = {
        "source": config.model.source,
        "revision": revision,
        "tokenizer": config.model.tokenizer,
    }
    output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
