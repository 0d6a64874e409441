"""GGUF files as folders of safetensors, which are made once, in a cache that all runs share."""

import errno
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from theloom.errors import ModelError

log = logging.getLogger(__name__)

_BLOCK = 1 << 24


def cache_folder() -> Path:
    """Where converted models are kept.

    Returns:
        The folder of THELOOM_CACHE, else `theloom` in the user's cache folder; it may not be there
        yet.
    """
    if "THELOOM_CACHE" in os.environ:
        return Path(os.environ["THELOOM_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "theloom"


def conversion(gguf: Path) -> Path:
    """Where the conversion of a GGUF file is kept, named by the file's content.

    Args:
        gguf: the file.

    Returns:
        The folder, which may not be there yet.
    """
    return cache_folder() / "models" / f"{gguf.stem}-{content_hash(gguf)[:16]}"


def converted(gguf: Path) -> Path:
    """The folder of safetensors made from a GGUF file, converted now if need be; it appears whole
    or not at all.

    Args:
        gguf: the file.

    Returns:
        The folder.

    Raises:
        ModelError: the file cannot be read.
    """
    target = conversion(gguf)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(Path(f"{target}.lock")):
        if not target.is_dir():
            log.info("converting %s to safetensors, once", gguf.name)
            unfinished = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
            try:
                _convert(gguf, unfinished)
                unfinished.chmod(0o755)
                if not target.is_dir():
                    unfinished.rename(target)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return target


@contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    """Other jobs wait meanwhile. Where the disk has no locks two may convert, and one's is kept."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            log.warning("%s: this disk has no locks: other jobs may convert too", lock.parent)
        yield


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:  # whatever readers raise at a file is a fault of its bytes
        raise ModelError(
            f"model.gguf_file: {gguf.name} cannot be read: {' '.join(str(error).split())}"
        ) from None
    # the weights are dequantised now: without this save_pretrained refuses, taking them for
    # quantised ones
    setattr(model, "hf_quantizer", None)  # noqa: B010
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def content_hash(file: Path) -> str:
    """XXH3-128 of a file's bytes.

    Args:
        file: its path.

    Returns:
        32 hex digits.
    """
    state = xxhash.xxh3_128()
    with file.open("rb") as f:
        while block := f.read(_BLOCK):
            state.update(block)
    return state.hexdigest()
