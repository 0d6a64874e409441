"""Values of a config that have the right type and yet make no sense."""

import re
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from theloom.config import answers, auto
from theloom.config.model_dims import LAYERS, SIZE
from theloom.config.schema import PATHS, Config
from theloom.errors import ConfigError
from theloom.rows import expression
from theloom.rows.modality import CHAT, INPUT_IMAGES, SENSED

SOURCE_IDS = "source_ids"
"""The column of a run of a decoder that holds the encoder's token ids of each document."""

LEAST_CHUNK = 3  # so that no chunk need be of one token

# The key that says where a corpus is, which the other kinds of corpora have no use for.
_WHERE = {"text": "path", "hub": "dataset", "images": "path", "audio": "path"}


def check(config: Config) -> None:
    """Check the values of a composed config.

    Args:
        config: The composed config of a run.

    Raises:
        ConfigError: A value is missing, out of its range, or of no use with another one.
    """
    if OmegaConf.is_missing(config.model, "source"):
        raise ConfigError("model.source: not set; give a hub id, a local folder or package:NAME")
    at_least_one = {
        "extraction.batch_tokens": config.extraction.batch_tokens,
        "extraction.shards": config.extraction.shards,
        "corpus.max_documents": config.corpus.max_documents,
        "corpus.max_tokens": config.corpus.max_tokens,
        "corpus.context_length": config.corpus.context_length,
        "verify.documents": config.verify.documents,
        "verify.jobs": config.verify.jobs,
        "report.sampled_rows": config.report.sampled_rows,
        "report.map_rows": config.report.map_rows,
        "resources.threads": config.resources.threads,
        "resources.min_shards": config.resources.min_shards,
        "resources.shards_per_job": config.resources.shards_per_job,
        "resources.tokenize_jobs": config.resources.tokenize_jobs,
        "resources.mem_mb": config.resources.mem_mb,
        "resources.load_mem_mb": config.resources.load_mem_mb,
        "resources.runtime": config.resources.runtime,
        "resources.verify_runtime": config.resources.verify_runtime,
        "resources.sample_runtime": config.resources.sample_runtime,
        "resources.sample_disk_mb": config.resources.sample_disk_mb,
        "resources.disk_mb": config.resources.disk_mb,
        "resources.min_free_gpu_mb": config.resources.min_free_gpu_mb,
    }
    at_least_one |= {
        "answers.max_new_tokens": config.answers.max_new_tokens,
        "answers.samples": config.answers.samples,
        "answers.top_k": config.answers.top_k,
        "answers.batch": config.answers.batch,
    }
    for key, value in at_least_one.items():
        if value is not None and value < 1:
            raise ConfigError(f"{key}: {value} is too small; the least is 1")
    if config.memory.streaming_chunk_size < LEAST_CHUNK:
        raise ConfigError(
            f"memory.streaming_chunk_size: {config.memory.streaming_chunk_size} is too small; the "
            f"least is {LEAST_CHUNK}: models compute a step of one token by other code"
        )
    for key, share in {
        "gpu_memory_gb": config.resources.gpu_memory_gb,
        "tokens_per_second": config.resources.tokens_per_second,
    }.items():
        if share is not None and not share > 0:
            raise ConfigError(f"resources.{key}: {share} is not above 0")
    for key, number in {
        "resources.gpu": config.resources.gpu,
        "report.attention_document": config.report.attention_document,
    }.items():
        if number is not None and number < 0:
            raise ConfigError(f"{key}: {number} is too small; the least is 0")
    label = config.report.label
    if label is not None and label not in config.corpus.columns:
        there = ", ".join(config.corpus.columns) or "none"
        raise ConfigError(
            f"report.label: {label!r} is not among corpus.columns ({there}); add it there"
        )
    profiled, shards = config.memory.profile_shard, config.extraction.shards or 1  # a number by now
    if profiled is not None and not 0 <= profiled < shards:
        raise ConfigError(
            f"memory.profile_shard: {profiled} is no shard; the run's shards are 0 to {shards - 1}"
        )
    if not 0 < config.memory.memory_warning_threshold <= 1:
        threshold = config.memory.memory_warning_threshold
        raise ConfigError(
            f"memory.memory_warning_threshold: {threshold} is not a share; give more than 0, at "
            "most 1"
        )
    remote = config.store.remote
    if remote is not None and not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://.", remote):
        raise ConfigError(
            f"store.remote: {remote!r} is no URL; give s3://bucket/folder, gs://bucket/folder or "
            "hf://user/name"
        )
    if not config.store.keep_local and (remote is None or config.store.merge.name != "virtual"):
        raise ConfigError(
            "store.keep_local=false removes shards that activations.h5 refers to, once they are in "
            "store.remote; set store.remote to a URL, and store.merge=virtual"
        )
    overflow = config.store.max_overflow
    if overflow is not None and not 0 <= overflow <= 1:
        raise ConfigError(
            f"store.max_overflow: {overflow} is not a share; give at least 0, at most 1"
        )
    if config.verify.tolerance is not None and not config.verify.tolerance > 0:
        raise ConfigError(f"verify.tolerance: {config.verify.tolerance} is not above 0")
    if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:[0-9]+)?", config.extraction.device):
        raise ConfigError(
            f"extraction.device: {config.extraction.device!r} is not auto, cpu, cuda, cuda:N, xpu, "
            "xpu:N or mps"
        )
    _check_architecture(config)
    _check_paths(config)
    _check_corpus(config)
    _check_rows(config)
    answers.check(config)
    _check_modality(config)
    _check_side(config)
    _check_stages(config)


def _check_stages(config: Config) -> None:
    """What goes with hook points in stages."""
    named, kind = auto.stages(config.memory.activation_cache_filter), config.corpus.kind.name
    if list(config.model.stages) != named:
        raise ConfigError(
            f"model.stages={list(config.model.stages)}: the hook points are "
            f"{named or 'in no stages'}; leave it out, a run sets it by its hook points"
        )
    if named and kind != "images":
        raise ConfigError(
            f"memory.activation_cache_filter: {named[0]} is of an image model in stages, and the "
            f"corpus is {kind}; set corpus=images and corpus.path"
        )


def _check_architecture(config: Config) -> None:
    declared = config.model.architecture
    if declared is None:
        return
    for name, value in cast(dict[str, Any], declared).items():
        least = 0 if name in ("parameters", "max_position_embeddings") else 1
        most = LAYERS if name == "num_hidden_layers" else SIZE
        if isinstance(value, int) and not (
            isinstance(value, bool) or name == "parameters" or least <= value <= most
        ):
            raise ConfigError(
                f"model.architecture.{name}: {value} is no number from {least} to {most:,}"
            )


def _check_corpus(config: Config) -> None:
    needed = _WHERE.get(config.corpus.kind.name)
    if config.corpus.kind.name in SENSED and config.corpus.dataset is not None:
        if config.corpus.path is not None:
            raise ConfigError(
                f"corpus.path: {config.corpus.path!r}, and corpus.dataset is "
                f"{config.corpus.dataset!r}: the files are in one of them; take the other out"
            )
        needed = "dataset"
    if needed and getattr(config.corpus, needed) is None:
        group = config.corpus.kind.name
        example = f'set="corpus={group} corpus.{needed}=…"'
        raise ConfigError(f"corpus.{needed}: not set; corpus={group} needs it: {example}")
    _check_columns(config)
    for group, key in (("text", "path"), ("hub", "dataset")):
        if key != needed and getattr(config.corpus, key) is not None:
            requested = getattr(config.corpus, key)
            raise ConfigError(
                f"corpus.{key}: {requested!r} is for corpus={group} alone; add corpus={group}, or "
                "take it out"
            )


def _check_modality(config: Config) -> None:
    """What goes with images and audio, whose rows are no tokens."""
    modality = None if config.model.modality is None else config.model.modality.name
    kind, corpus = config.corpus.kind.name, config.corpus
    side = auto.side(config.memory.activation_cache_filter)
    if corpus.images is not None and modality != CHAT:
        raise ConfigError(
            f"corpus.images: {corpus.images!r} holds images of conversations, and model.modality "
            f"is {modality}; set it to {CHAT}, or take corpus.images out"
        )
    if modality == CHAT:
        _check_chat(config)
        return
    if modality is not None and kind != modality:
        raise ConfigError(
            f"model.modality={modality}: the corpus is {kind}; set corpus={modality} and "
            "corpus.path, or take model.modality out"
        )
    if kind not in SENSED:
        return
    of_texts = {
        "corpus.max_tokens": corpus.max_tokens,
        "corpus.input_ids": corpus.input_ids,
        "corpus.messages": corpus.messages,
        "answers.source": config.answers.source,
        "resources.tokenize_jobs": config.resources.tokenize_jobs,
    }
    if side != "decoder":
        of_texts["model.tokenizer"] = config.model.tokenizer
    _check_unset(of_texts, f"is for texts, and the corpus is {kind}; take it out or set it null")
    if side == "decoder" and kind != "audio":
        raise ConfigError(
            f"memory.activation_cache_filter: a decoder is read behind texts or audio, and the "
            f"corpus is {kind}; name hook points of the encoder (encoder.blocks.…)"
        )
    if config.extraction.execution.name == "layerwise":
        raise ConfigError(
            f"extraction.execution=layerwise: a model of {kind} runs on the device as a whole "
            "alone; set it to resident or auto"
        )


def _check_unset(settings: dict[str, Any], words: str) -> None:
    """Keys that must be null, and what an error says of one that is not."""
    for key, value in settings.items():
        if value is not None:
            raise ConfigError(f"{key}={getattr(value, 'name', value)}: {words}")


def _check_chat(config: Config) -> None:
    """What goes with conversations that have images."""
    corpus, texts = config.corpus, "conversations with images (model.modality=chat)"
    if corpus.kind.name != "text" or corpus.messages is None:
        raise ConfigError(
            f"model.modality=chat: the corpus is {corpus.kind.name} and corpus.messages is "
            f"{corpus.messages}; set corpus=text, corpus.path and corpus.messages, or take "
            "model.modality out"
        )
    without = {
        "model.tokenizer": config.model.tokenizer,
        "model.side": config.model.side,
        "answers.source": config.answers.source,
        "resources.tokenize_jobs": config.resources.tokenize_jobs,
    }
    _check_unset(without, f"does not go with {texts}; take it out")
    if config.extraction.execution.name == "layerwise":
        raise ConfigError(
            f"extraction.execution=layerwise: {texts} run on the device as a whole alone; set it "
            "to resident or auto"
        )
    if INPUT_IMAGES in corpus.columns:
        raise ConfigError(
            f"corpus.columns: {INPUT_IMAGES!r} is what the run calls the images of each document; "
            "rename the corpus' column"
        )


def _check_side(config: Config) -> None:
    """What goes with hook points of an encoder-decoder."""
    side = None if config.model.side is None else config.model.side.name
    named, target = auto.side(config.memory.activation_cache_filter), config.corpus.target
    if side != named:
        raise ConfigError(
            f"model.side={side}: the hook points are of {named or 'one list of blocks'}; name them "
            f"{side}.blocks.… in memory.activation_cache_filter"
        )
    if target is not None and side != "decoder":
        raise ConfigError(
            f"corpus.target: {target!r} is the text of a decoder, and no hook point is one of a "
            "decoder (decoder.blocks.…); take it out"
        )
    if side is None:
        return
    if config.extraction.execution.name == "layerwise":
        raise ConfigError(
            f"extraction.execution=layerwise: the {side} of an encoder-decoder runs on the device "
            "as a whole alone; set it to resident or auto"
        )
    if config.answers.source is not None:
        raise ConfigError(
            f"answers.source={config.answers.source.name}: an encoder-decoder gives no answers; "
            "take it out"
        )
    if side == "encoder":
        return
    if target is None:
        raise ConfigError(
            "corpus.target: not set; hook points of a decoder need the column that holds its texts"
        )
    if config.corpus.messages is not None:
        raise ConfigError(
            "corpus.messages: conversations have no target; write source and target as texts"
        )


def _check_rows(config: Config) -> None:
    keep = expression.parse(config.rows.keep)
    if keep.asks_for_generated and config.answers.source is None:
        raise ConfigError(
            f"rows.keep={keep.text}: generated is of answers, and the run has none; set "
            "answers.source to model or column"
        )
    if config.rows.by.name == "message" and config.rows.pool.name == "none":
        raise ConfigError(
            "rows.by: message is of use with rows.pool alone; set rows.pool=mean, or take it out"
        )


def _check_columns(config: Config) -> None:
    corpus = config.corpus
    if corpus.input_ids is not None and corpus.messages is not None:
        raise ConfigError(
            "corpus.input_ids and corpus.messages: a document is either token ids or a "
            "conversation; take one out"
        )
    if corpus.chat_template is not None and corpus.messages is None:
        raise ConfigError(
            "corpus.chat_template: is for corpus.messages alone; set that too, or take it out"
        )
    if corpus.streaming and corpus.kind.name != "hub":
        raise ConfigError("corpus.streaming: is for corpus=hub alone; take it out")
    names = list(corpus.columns)
    if SOURCE_IDS in names:  # whose values the stages would take for those of a decoder's run
        raise ConfigError(
            f"corpus.columns: {SOURCE_IDS!r} is what a run calls the encoder's token ids; rename "
            "the corpus' column"
        )
    for name in names:
        if not name or "\0" in name or name != name.encode(errors="replace").decode():
            raise ConfigError(f"corpus.columns: {name!r} is no name of a column; correct it")
        if names.count(name) > 1:
            raise ConfigError(f"corpus.columns: {name!r} is there twice; take one out")


def _check_paths(config: Config) -> None:
    for key in PATHS:
        path = OmegaConf.select(cast(Any, config), key)
        try:
            Path(path or "").expanduser().exists()
        except RuntimeError:
            raise ConfigError(
                f"{key}: {path!r}: {Path(path).parts[0]} is nobody's home folder; write "
                f"./{path} for a folder of that name"
            ) from None
        except OSError as error:  # too long, or a folder that may not be looked into
            raise ConfigError(f"{key}: {path!r}: {error.strerror}; give another path") from None
