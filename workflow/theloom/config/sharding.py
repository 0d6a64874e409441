"""How long a run is thought to take, before anything runs: tokens per second of one job, and shards
of ten minutes.

A forward pass costs two floating-point operations for each weight of the blocks and each token
(attention over the context, a few per cent, is left out). What devices do of them per second is the
makers' figure for dense 16-bit products times the share that inference reaches.
"""

import math

from theloom.config.schema import Config
from theloom.devices import gpu_specs

UNNAMED_GPU = 125.0
SHARE = 0.4  # of the peak that a forward pass over full batches reaches
FP32_SHARE = 1 / 16  # of the 16-bit peak: an A100's 19.5 of 312 TFLOP/s
QUANTIZED_SHARE = 0.5  # weights are made 16-bit again before each product

# One CPU thread in FP32: SmolLM2-135M was seen at 450 to 600 tokens/s on two
CPU_THREAD_TFLOPS = 0.06

SECONDS_OF_SHARD = 600
IMPORTING = 15  # seconds of a job before it reads weights, on a network file system
READING = 200e6  # bytes per second, of weights and rows on a network file system
LOADING_SHARE = 0.05  # of a job, at most
MIN_SHARDS, MAX_SHARDS = 2, 1000  # a virtual dataset opens every shard's file
TOKENS_OF_SHARD = 250_000  # of a model whose numbers are not known before it is looked at
SHARDS_OF_VERIFICATION = 100  # whose rows one job checks
SHARDS_OF_UNKNOWN = 8  # of a corpus whose tokens are not known


def tokens_per_second(config: Config, block_parameters: int | None = None) -> float | None:
    """What one job is planned to forward.

    Args:
        config: The run's config.
        block_parameters: Parameters of the blocks, for a model whose profile has no numbers.

    Returns:
        Tokens per second, None where neither gives the model's size.
    """
    if config.resources.tokens_per_second is not None:
        return float(config.resources.tokens_per_second)
    size = config.model.architecture
    if size is not None and size.parameters:
        embeddings = size.vocab_size * size.hidden_size * (1 if size.tie_word_embeddings else 2)
        block_parameters = size.parameters - embeddings
    if block_parameters is None:
        return None
    return 1e12 * _tflops(config) / (2 * max(block_parameters, 1))


def _tflops(config: Config) -> float:
    if config.extraction.device == "cpu" or config.resources.gpu == 0:
        return config.resources.threads * CPU_THREAD_TFLOPS
    gpus = gpu_specs.find(config.resources.gpu_model or "")
    peak = min((gpu.tflops for gpu in gpus if gpu.tflops), default=UNNAMED_GPU)
    share = SHARE
    if config.memory.quantization is not None:
        share *= QUANTIZED_SHARE
    if config.memory.precision_mode.name == "fp32":
        share *= FP32_SHARE
    return peak * share


def shards(config: Config) -> int:
    """How many shards a corpus is split into where `extraction.shards` leaves it open.

    Jobs of about ten minutes: long enough that loading the model is little of them, short enough
    that losing one is.

    Args:
        config: Of a run.

    Returns:
        Shards, from `resources.min_shards` (2 at least) to `MAX_SHARDS`.
    """
    least = max(MIN_SHARDS, config.resources.min_shards)
    if config.corpus.max_tokens is None:
        return max(SHARDS_OF_UNKNOWN, least)
    speed = tokens_per_second(config)
    tokens = TOKENS_OF_SHARD if speed is None else max(1, int(speed * SECONDS_OF_SHARD))
    return max(least, min(-(-config.corpus.max_tokens // tokens), MAX_SHARDS))


def shards_per_job(config: Config, shards: int) -> int:
    """How many shards a job extracts where `resources.shards_per_job` leaves it open.

    As many as keep importing code and loading the model at `LOADING_SHARE` of the job, and no more
    than leave `resources.min_shards` jobs.

    Args:
        config: Of a run.
        shards: Shards of the run.

    Returns:
        Shards, 1 at least; 1 where the profile has no size of the model, or the corpus none.
    """
    size, speed = config.model.architecture, tokens_per_second(config)
    if config.corpus.max_tokens is None or size is None or not size.parameters or speed is None:
        return 1
    loading = IMPORTING + 2 * size.parameters / READING
    extracting = config.corpus.max_tokens / shards / speed
    wanted = math.ceil(loading * (1 / LOADING_SHARE - 1) / max(extracting, 1e-9))
    jobs = max(MIN_SHARDS, config.resources.min_shards)
    return max(1, min(wanted, shards // jobs))


def groups(shards: int, per_job: int) -> list[range]:
    """The shards of each job.

    Args:
        shards: Of the run.
        per_job: As `resources.shards_per_job`.

    Returns:
        Numbers of shards, job by job; the last job may have fewer.

    Examples:
        >>> groups(5, 2)
        [range(0, 2), range(2, 4), range(4, 5)]
    """
    return [range(n, min(n + per_job, shards)) for n in range(0, shards, per_job)]


def verification_jobs(jobs: int | None, shards: int, documents: int) -> tuple[int, int]:
    """How many jobs verify a run.

    Args:
        jobs: What `verify.jobs` requests.
        shards: Shards of the run.
        documents: Documents to recompute.

    Returns:
        The jobs that check rows, and those that recompute documents; where both are 1, one job does
        it all.

    Examples:
        >>> verification_jobs(None, 2, 8), verification_jobs(None, 1000, 8)
        ((1, 1), (10, 1))
        >>> verification_jobs(20, 1000, 8)
        (20, 8)
    """
    if jobs is None:
        return max(1, -(-shards // SHARDS_OF_VERIFICATION)), 1
    return min(jobs, max(1, shards)), min(jobs, documents)
