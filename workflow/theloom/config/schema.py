"""The schema of the configuration: every key with its type, its default and what it means.

Hydra composes the YAML files of `config/` into this schema, which rejects unknown keys and wrong
types. The `help` of a field is its documentation: the table in config/README.md is made from it.
"""

from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any, get_args

PrecisionMode = Enum("PrecisionMode", ["auto", "fp32", "fp16", "bf16"])
StoreDtype = Enum("StoreDtype", ["auto", "fp32", "fp16", "bf16", "fp8_e4m3", "int8"])
Quantization = Enum("Quantization", ["8bit", "4bit"])
Attention = Enum("Attention", ["auto", "sdpa", "eager", "flash_attention_2"])
Compression = Enum("Compression", ["none", "zstd"])
Execution = Enum("Execution", ["auto", "resident", "layerwise"])
CachePlace = Enum("CachePlace", ["auto", "device", "offloaded"])
MergeMode = Enum("MergeMode", ["virtual", "physical"])
TokenizerFrom = Enum("TokenizerFrom", ["class", "file"])
Pool = Enum("Pool", ["none", "mean", "max", "sum", "first", "last"])
PoolBy = Enum("PoolBy", ["document", "message"])
CorpusKind = Enum("CorpusKind", ["python_docs", "text", "hub", "images", "audio"])
DuplicateIds = Enum("DuplicateIds", ["error", "number"])
Side = Enum("Side", ["encoder", "decoder"])
Modality = Enum("Modality", ["images", "audio", "chat"])
AnswersFrom = Enum("AnswersFrom", ["model", "column"])


PATHS = ("model.source", "model.tokenizer", "corpus.path", "corpus.dataset", "corpus.chat_template")
"""Keys whose text may be a path: `~` at its start is the user's home."""

ONE_OR_MORE = ("model.adapter",)
"""Keys of a list that take one value without brackets too."""


def key(default: Any, help: str) -> Any:  # noqa: A002
    """Make a dataclass field with its documentation.

    Args:
        default: The default; a list is copied, a type is called for each config.
        help: What the key means, one line of Markdown.

    Returns:
        The field.
    """
    if isinstance(default, list | type):
        return field(
            default_factory=default.copy if isinstance(default, list) else default,
            metadata={"help": help},
        )
    return field(default=default, metadata={"help": help})


def renamed(name: str) -> Any:
    """Make a field for the old name of a key of the same section; it has no documentation of its
    own.

    Args:
        name: The new name, without the section.

    Returns:
        The field, without a value.
    """
    return field(default="???", metadata={"renamed": name})


@dataclass
class ArchitectureConfig:
    """Dimensions of a public model's config.json, so that the estimate needs neither weights nor a
    hub.
    """

    model_type: str = key("llama", "architecture, as transformers names it")
    hidden_size: int = key(0, "width of the residual stream")
    num_hidden_layers: int = key(0, "number of blocks")
    num_attention_heads: int = key(0, "query heads")
    num_key_value_heads: int = key(0, "key and value heads")
    head_dim: int | None = key(None, "size of a head; null: hidden_size / num_attention_heads")
    intermediate_size: int = key(0, "width of the MLP")
    vocab_size: int = key(0, "rows of the token embedding")
    tie_word_embeddings: bool = key(False, "whether the LM head is the token embedding")
    max_position_embeddings: int = key(0, "context length in tokens")
    parameters: int = key(0, "parameters of the whole model, LM head included")


@dataclass
class ModelConfig:
    """Which model, and where its files are."""

    source: str = key(
        "???",
        "hub id, local folder, or `package:NAME` for the folder of an installed Python package "
        "(`package:NAME/FOLDER` for one in it)",
    )
    revision: str | None = key(None, "branch, tag or commit of a hub model; null: its main branch")
    gguf_file: str | None = key(
        None, "GGUF file inside the source; null: found, where the source has no safetensors"
    )
    adapter: list[str] = key(
        [],
        "adapter of PEFT that is merged into the model, or several in their order: folders or hub "
        "ids, with `@revision` behind them or without; empty: none",
    )
    tokenizer: str | None = key(None, "source of another tokenizer; null: the model's own")
    allow_pickle: bool = key(False, "load pickled weights (.bin): they can run code on loading")
    trust_remote_code: bool = key(False, "run Python code that the model's folder brings along")
    ignore_own_code: bool = key(
        False,
        "leave out Python code that the model's folder brings along, and take the class of "
        "transformers for its model_type",
    )
    architecture: ArchitectureConfig | None = key(
        None, "the model's numbers, for the estimate; null: read from the model's config"
    )
    side: Side | None = key(
        None,
        "encoder or decoder: the half of an encoder-decoder that is read; null: the one that the "
        "hook points name",
    )
    modality: Modality | None = key(
        None,
        "images or audio: what the model reads instead of texts; chat: conversations with images, "
        "of `corpus.messages`; null: what the corpus has",
    )
    stages: list[str] = key(
        [],
        "hook points in stages that are read of an image model: a document has as many rows as "
        "they; empty: those that the hook filter names",
    )


@dataclass
class MemoryConfig:
    """How the model's memory is spent."""

    precision_mode: PrecisionMode = key(
        PrecisionMode["auto"], "precision of weights and forward pass"
    )
    quantization: Quantization | None = key(None, "8-bit or 4-bit weights through bitsandbytes")
    enable_gradient_checkpointing: bool = key(
        False, "for training only; extraction has no backward pass"
    )
    streaming_chunk_size: int = key(512, "tokens of one forward step over a long document")
    memory_warning_threshold: float = key(
        0.85, "warn when more than this share of the device's memory is in use"
    )
    activation_cache_filter: list[str] = key(
        [], "hook points: exact names or globs; empty: every hook point"
    )
    profile_shard: int | None = key(
        None,
        "debugging: the shard, from 0, of whose largest batch the memory peak is recorded in "
        "`memory/` of the run's "
        "folder; slows it, runs the extraction again, changes no row; null: none",
    )


@dataclass
class ExtractionConfig:
    """How the forward passes are run."""

    device: str = key(
        "auto", "auto, cpu, cuda, cuda:N, xpu, xpu:N or mps; auto: a GPU where there is one"
    )
    attention: Attention = key(
        Attention["auto"], "attention implementation; auto: what transformers chooses"
    )
    execution: Execution = key(
        Execution["auto"],
        "resident: the model stays on the device; layerwise: one block at a time does, for models "
        "larger than it; "
        "auto: resident where it fits",
    )
    batch_tokens: int | None = key(
        None,
        "tokens of one forward pass over short documents, padding included; null: what fits the "
        "free memory, at most "
        "16,384 on a GPU and 2,048 on a CPU",
    )
    cache: CachePlace = key(
        CachePlace["auto"],
        "where the KV cache of long documents is: on the device, or offloaded to host memory; "
        "auto: on the device "
        "where it fits; on a CPU the two are the same",
    )
    shards: int | None = key(
        None,
        "files, and so independent jobs, that the corpus is split into; null: jobs of about ten "
        "minutes, at most "
        "1,000; a run that has started keeps its number",
    )


@dataclass
class StoreConfig:
    """How the hidden states are written."""

    dtype: StoreDtype = key(
        StoreDtype["auto"],
        "precision on disk; auto: that of the forward pass; fp8_e4m3, int8: one byte a value and a "
        "scale a row, read as FP32",
    )
    merge: MergeMode = key(
        MergeMode["virtual"],
        "activations.h5 refers to the shards (virtual) or copies them (physical)",
    )
    compression: Compression = key(
        Compression["none"],
        "zstd: smaller by a seventh (bf16: by a third), and slower to read, above all row by row",
    )
    remote: str | None = key(
        None,
        "URL of a folder, such as s3://bucket/runs: each shard is pushed to URL/NAME, of the run, "
        "as soon as it is finished, the rest once the run is verified; null: nothing is pushed",
    )
    keep_local: bool = key(
        True,
        "false: once the run is pushed, each shard is read back from store.remote, and its local "
        "file removed; activations.h5 is read at the URL from then on",
    )
    max_overflow: float | None = key(
        None,
        "fp16 only: the share of a hook point's values that may be beyond 65,504, and so infinite, "
        "before the job "
        "stops with an error; null: none",
    )
    allow_nonfinite: bool | None = key(
        None,
        "keep values that the model gives as NaN or infinite; else the job ends where it meets the "
        "first one",
    )


@dataclass
class CorpusConfig:
    """Where the texts come from, and how they become tokens."""

    kind: CorpusKind = key(
        CorpusKind["python_docs"],
        "set by the corpus group: `corpus=text`, `corpus=hub`, `corpus=images`, `corpus=audio`",
    )
    path: str | None = key(
        None,
        "text: a file, or a folder of files: .txt, .md, .jsonl, .json, .csv, .tsv, .parquet, "
        ".arrow, .fasta, .fa or .faa, also compressed (.gz, .zst); images, audio: a file, a folder "
        "of files, or a .parquet file with a column of them",
    )
    encoding: str = key("utf-8", "text: encoding of the files")
    dataset: str | None = key(
        None,
        "hub, images, audio: id or local path of a `datasets` data set, or a .parquet file; of "
        "images and audio in place of `corpus.path`",
    )
    subset: str | None = key(
        None, "with `corpus.dataset`: name of the configuration, where the data set has several"
    )
    split: str = key("train", "with `corpus.dataset`: which split")
    streaming: bool = key(
        False, "hub: read rows as they come instead of downloading the split first"
    )
    column: str = key("text", "hub and tables: the column that holds the text")
    id_column: str | None = key(
        None, "hub and tables: the column that names a document; null: its number"
    )
    duplicate_ids: DuplicateIds = key(
        DuplicateIds["error"],
        "what to do where two documents have one id; number: the second gets #2, and so on",
    )
    columns: list[str] = key(
        [],
        "hub and tables: more columns, such as labels, that go with each document into the files",
    )
    target: str | None = key(
        None,
        "hub and tables: the column that holds the decoder's text, for hook points of the decoder "
        "of an encoder-decoder; the text itself, or the clip, is the encoder's",
    )
    input_ids: str | None = key(
        None, "hub and tables: the column that holds token ids, taken as they are instead of texts"
    )
    messages: str | None = key(
        None, "hub and tables: the column that holds conversations, rendered by the chat template"
    )
    images: str | None = key(
        None,
        "messages: the column that holds the images of a conversation, for parts that name none of "
        "their own; sets `model.modality=chat`",
    )
    chat_template: str | None = key(
        None, "messages: a file with another chat template (Jinja); null: the tokenizer's own"
    )
    max_documents: int | None = key(None, "take at most this many documents; null: all")
    max_tokens: int | None = key(
        None, "take at most this many tokens; the last document is cut there; null: all"
    )
    context_length: int | None = key(
        None,
        "longer documents are split into windows of this many tokens; null: the model's own limit. "
        "Images, audio: rows of the largest document, beyond which one is refused; null: those of "
        "the model's own size, or of 30 seconds",
    )
    tokenizer_from: TokenizerFrom = key(
        TokenizerFrom["class"],
        "class: the token ids of the tokenizer class of transformers; file: those of "
        "tokenizer.json as it stands",
    )
    add_special_tokens: bool = key(True, "let the tokenizer add its special tokens (BOS, for most)")


@dataclass
class RowsConfig:
    """Which rows are stored."""

    keep: str = key(
        "all",
        "the tokens whose rows are kept: `all`, `first`, `last`, `last(n)`, `[a:b]`, `special`, "
        "`assistant`, `user`, `system`, `tool`, `image`, `generated`, `message(n)`, "
        '`span("column")`, `match("regex")`, joined by `&`, `\\|`, `~` and brackets',
    )
    pool: Pool = key(
        Pool["none"],
        "one row for each document, made of its kept rows; mean and sum are computed in FP32 and "
        "added up in FP64",
    )
    by: PoolBy = key(PoolBy["document"], "with `rows.pool`: one row for each document or message")


@dataclass
class AnswersConfig:
    """Answers to the corpus' documents, whose hidden states are extracted with the prompts'."""

    source: AnswersFrom | None = key(
        None,
        "model: the run's own model answers each document; column: another engine has, and a "
        "column of the corpus holds its answers; null: documents are taken as they are",
    )
    column: str | None = key(
        None,
        "source=column: the column with an answer or a list of them, as texts, lists of token ids, "
        "or the outputs of vLLM or SGLang",
    )
    max_new_tokens: int = key(256, "tokens of an answer at most")
    samples: int = key(1, "answers to each document; their ids end in #0, #1, …")
    temperature: float = key(0.0, "0: the most probable token (greedy); else tokens are drawn")
    top_p: float = key(
        1.0, "draw from the most probable tokens that have this probability together; 1: from all"
    )
    top_k: int | None = key(None, "draw from so many of the most probable tokens; null: from all")
    seed: int = key(
        0, "seed of all draws; each answer's own follows from it, its id and its number"
    )
    stop: list[str] = key([], "texts that end an answer; the tokens that complete one are kept")
    batch: int | None = key(
        None, "answers that are sampled side by side; null: as many as the free memory holds, or 64"
    )


@dataclass
class VerifyConfig:
    """How the finished rows are checked against the model."""

    documents: int = key(8, "documents to recompute; the longest is always among them")
    tolerance: float | None = key(
        None,
        "largest error allowed, as a share of the hook's largest absolute value; null: by "
        "precision, "
        "and in 16 bits by how far the model itself is from FP32",
    )
    seed: int = key(0, "seed of the choice of documents")
    compare_to_fp32: bool = key(
        True,
        "quantised runs: load the model in FP32 too, where it fits, and record the residuals' "
        "cosine similarity",
    )
    jobs: int | None = key(
        None,
        "so many jobs check rows, each a group of shards, and so many recompute documents; null: "
        "one does all, or one for each 100 shards checks rows",
    )


@dataclass
class ReportConfig:
    """What the figures show; nothing but figures depends on it."""

    title: str | None = key(None, "first words of each figure's title; null: the run's name")
    label: str | None = key(
        None,
        "column of `corpus.columns` with two to twenty values: the report gets the accuracy of a "
        "linear probe by hook point, and colours the map by it; the run then ends with the report",
    )
    sampled_rows: int = key(
        8192, "rows that the figures of hidden states are taken over, of windows chosen at random"
    )
    map_hook: str | None = key(
        None, "hook point of the map; null: the middle one of the residual stream"
    )
    map_rows: int = key(1000, "rows on the map")
    attention_document: int = key(
        0, "document, from 0, whose attention patterns are shown, where they were captured"
    )
    figure_seed: int = key(0, "seed of the choice of rows")


@dataclass
class ResourcesConfig:
    """What a job that holds the model asks of the scheduler."""

    threads: int = key(2, "CPU threads")
    mem_mb: int | None = key(
        None, "host memory in MB, and that much more for each retry; null: from the estimate"
    )
    load_mem_mb: int | None = key(
        None, "the same for load_model, which converts GGUF files; null: from the estimate"
    )
    runtime: int | None = key(
        None, "minutes, and as many more for each retry; null: from the planned throughput"
    )
    verify_runtime: int | None = key(
        None, "the same for verify, which reads all rows; null: from the planned throughput"
    )
    sample_runtime: int | None = key(
        None,
        "the same for sample_answers; null: from corpus.max_documents and answers.max_new_tokens",
    )
    sample_disk_mb: int | None = key(
        None, "disk that the answers of a shard take in MB; null: from the same"
    )
    disk_mb: int | None = key(None, "disk that a shard takes in MB; null: from the estimate")
    gpu: int | None = key(
        None, "GPUs; null: as many as hold the model, none where extraction.device is cpu"
    )
    gpu_model: str | None = key(None, "the GPU to ask for, by the scheduler's name, such as a100")
    gpu_memory_gb: float | None = key(
        None,
        "memory of one such GPU in GB of 10⁹ bytes; null: that of gpu_model, else of an 80 GB GPU",
    )
    min_free_gpu_mb: int | None = key(
        None,
        "memory that a job needs on each of its GPUs in MB, looked at before one is taken; null: "
        "from the estimate",
    )
    min_shards: int = key(
        2,
        "where extraction.shards is null, at least so many: the GPUs or nodes that shall work at "
        "once",
    )
    tokenize_jobs: int | None = key(
        None,
        "jobs that share the corpus of tokenize_corpus, each a part of its files' bytes; null: one "
        "job; a run that has its tokens keeps its number",
    )
    shards_per_job: int | None = key(
        None,
        "shards that one job extracts with the model loaded once; null: one, or where "
        "extraction.shards is null, too, so many that loading is at most 5% of the job, as long as "
        "min_shards jobs are left; a run that has shards keeps its number",
    )
    constraint: str | None = key(None, "Slurm: features that a node must have, such as gpu80gb")
    tokens_per_second: float | None = key(
        None,
        "measured throughput of one job, for the number of shards and the minutes; null: planned",
    )
    needed_gpu_mb: int | None = renamed("min_free_gpu_mb")
    least_shards: int | None = renamed("min_shards")


@dataclass
class Config:
    """One run."""

    name: str | None = key(
        None, "folder of the run under results/; null: the profile and the overrides"
    )
    model: ModelConfig = key(ModelConfig, "")
    memory: MemoryConfig = key(MemoryConfig, "")
    extraction: ExtractionConfig = key(ExtractionConfig, "")
    store: StoreConfig = key(StoreConfig, "")
    corpus: CorpusConfig = key(CorpusConfig, "")
    rows: RowsConfig = key(RowsConfig, "")
    answers: AnswersConfig = key(AnswersConfig, "")
    verify: VerifyConfig = key(VerifyConfig, "")
    report: ReportConfig = key(ReportConfig, "")
    resources: ResourcesConfig = key(ResourcesConfig, "")


@dataclass(frozen=True)
class Key:
    """A documented key: its dotted name, its type as users write it, its default, its help."""

    name: str
    type: str
    default: Any
    help: str


def _written_type(annotation: Any) -> str:
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " \\| ".join(annotation.__members__)
    members = [a for a in get_args(annotation) if a is not type(None)]
    if type(None) in get_args(annotation):
        return f"{_written_type(members[0])} \\| null"
    if members:
        return f"list of {_written_type(members[0])}"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true \\| false"}[
        annotation.__name__
    ]


def _leaves(section: type, prefix: str) -> Iterator[tuple[str, Field[Any]]]:
    """The dotted name and the field of every leaf key, the old names of renamed keys included."""
    for f in fields(section):
        annotation = next((a for a in get_args(f.type) if is_dataclass(a)), f.type)
        if isinstance(annotation, type) and is_dataclass(annotation):
            yield from _leaves(annotation, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f


def types() -> dict[str, Any]:
    """List what a user may set, old names included.

    Returns:
        The annotation of each key by its dotted name.

    Examples:
        >>> types()["corpus.path"]
        str | None
    """
    optional = {"model.architecture": ArchitectureConfig | None}
    return optional | {name: f.type for name, f in _leaves(Config, "")}


def leaf_keys() -> list[Key]:
    """List all leaf keys of the schema.

    Returns:
        The keys in the order in which the schema declares them, without old names.

    Examples:
        >>> leaf_keys()[1].name
        'model.source'
    """
    found: list[Key] = []
    for name, f in _leaves(Config, ""):
        if "renamed" not in f.metadata:
            default = f.default_factory() if callable(f.default_factory) else f.default
            default = default.name if isinstance(default, Enum) else default
            found.append(Key(name, _written_type(f.type), default, f.metadata["help"]))
    return found


def key_table() -> str:
    """The Markdown table of all keys, as config/README.md shows it.

    Returns:
        Markdown with a line for each key: key, type, default, meaning.
    """
    spelled = {"None": "null", "True": "true", "False": "false", "???": "(must be set)"}
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for k in leaf_keys():
        default = "by profile" if k.name.startswith("model.architecture.") else str(k.default)
        default = spelled.get(default, default)
        rows.append(f"| `{k.name}` | {k.type} | `{default}` | {k.help} |")
    return "\n".join(rows)
