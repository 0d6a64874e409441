"""Export a file of hidden states: what is asked for, checked, then written by its format."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from theloom.errors import ConfigError
from theloom.exports import folder as folders
from theloom.exports.formats import FORMATS
from theloom.exports.job import Job
from theloom.hooks.points import RESIDUALS

if TYPE_CHECKING:
    from theloom.dataset.activations import Activations

log = logging.getLogger(__name__)

DTYPES = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Args:
        folder: where.
        rows: rows of each hook point.
        hooks: the hook points.
        left_out: what the format could not carry, in sentences.
    """

    folder: Path
    rows: int
    hooks: list[str]
    left_out: list[str]


def export(
    activations: "Activations | str | Path",
    to: str,
    folder: str | Path,
    *,
    hooks: Sequence[str] | None = None,
    keep: str | None = None,
    dtype: str | None = None,
    context_size: int | None = None,
    fit: str | None = None,
    progress: bool = False,
) -> Exported:
    """Write hidden states in the format of another project.

    An export that was stopped goes on when it is called again with the same arguments: files that
    are whole stay, and the one that was under way is written anew.

    Args:
        activations: `activations.h5` or a shard, as a path or opened.
        to: a format of `FORMATS`.
        folder: where the files go; it does not exist, or holds the same export.
        hooks: hook points, in order; None: all of the residual stream, or else all of the file.
        keep: an expression of `rows.keep`, which selects rows.
        dtype: `fp32`, `fp16` or `bf16`; None: the stored one.
        context_size: rows of a context, where the format has contexts of one length.
        fit: `pack` joins documents to contexts; `cut` takes whole contexts from each.
        progress: show a bar.

    Returns:
        What was written.

    Raises:
        ConfigError: the format does not fit the file, or the folder holds something else.
        HookError: the file has no such hook point.
        StoreError: the file is damaged.

    Examples:
        >>> import theloom, tempfile
        >>> acts = theloom.open("results/tiny/activations.h5")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     done = export(acts, "npy", folder + "/npy")
        >>> done.rows, done.hooks
        (290, ['blocks.1.hook_resid_post'])
    """
    from theloom.dataset.activations import open_activations

    acts = open_activations(activations) if isinstance(activations, str | Path) else activations
    folder = Path(folder)
    _check(to, context_size, fit, dtype)
    if acts.codebooks and FORMATS[to].ids:
        raise ConfigError(
            f"{to} has one token id a row, and rows of {acts.path} have {acts.codebooks} codes; "
            "give npy, safetensors or parquet"
        )
    identity: dict[str, Any] = {
        "format": to,
        "file": acts.path.name,
        "run_fingerprint": str(acts.attributes.get("run_fingerprint", "")),
        "keep": keep,
        "context_size": context_size,
        "fit": fit,
    }
    chosen = _hooks(acts, hooks)
    if keep is not None:
        acts = acts.select(keep)
    if not len(acts):
        raise ConfigError(f"{acts.path} has no rows to export")
    identity |= {"rows": len(acts), "hooks": chosen, "dtype": dtype or acts.precision}
    if folders.begin(folder, identity):
        log.info("%s is finished", folder)
        return Exported(folder, len(acts), chosen, folders.read_record(folder)["left_out"])
    with _bar(len(acts) * len(chosen), to, progress) as bar:
        job = Job(
            acts=acts,
            hooks=chosen,
            folder=folder,
            dtype=dtype or acts.precision,
            context_size=context_size,
            fit=fit,
            advance=bar.update,
        )
        FORMATS[to].write(job)
    folders.write_record(folder, identity, job.left_out, finished=True)
    for sentence in job.left_out:
        log.info("%s leaves out %s", to, sentence)
    return Exported(folder, len(acts), chosen, job.left_out)


def _check(to: str, context_size: int | None, fit: str | None, dtype: str | None) -> None:
    if to not in FORMATS:
        raise ConfigError(f"there is no format {to!r}; choose from {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"there is no dtype {dtype!r}; choose from {', '.join(DTYPES)}")
    if fit not in (None, "pack", "cut"):
        raise ConfigError(f"fit={fit!r}: give 'pack' or 'cut'")
    if (context_size or fit) and not FORMATS[to].contexts:
        having = ", ".join(name for name, f in FORMATS.items() if f.contexts)
        raise ConfigError(f"{to} has no contexts of one length; --context-size is for {having}")
    if context_size is not None and context_size < 1:
        raise ConfigError(f"--context-size: {context_size} is too small; the least is 1")
    if fit and context_size is None:
        raise ConfigError(f"--{fit} needs --context-size N")


def _hooks(acts: "Activations", hooks: Sequence[str] | None) -> list[str]:
    if hooks is None:
        residual = [hook for hook in acts.hooks if hook.split(".")[-1] in RESIDUALS]
        return residual or list(acts.hooks)
    if len(set(hooks)) != len(hooks) or not hooks:
        raise ConfigError(f"--hooks: {', '.join(hooks) or 'nothing'}; give each hook point once")
    for hook in hooks:
        acts[hook]  # raises HookError where the file lacks it
    return list(hooks)


def _bar(total: int, name: str, shown: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=name, unit=" rows", unit_scale=True, disable=not shown)
