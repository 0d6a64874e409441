"""Where a value is in a model, and how to read it there as TransformerLens shapes it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from theloom.errors import HookError
from theloom.hooks.layouts.chunked import pads_to_chunks

Batch = tuple[int, int]
Read = Callable[[torch.Tensor, Batch], torch.Tensor]


@dataclass(frozen=True)
class Site:
    """Where a value is: a module's input or output, or inside an attention module; and how to read
    it there.
    """

    module: nn.Module
    place: str  # input, output, inside, or state: in the cache, behind the module
    read: Read = lambda value, batch: whole(value, batch)
    # of the module's output, or of the tensors that it is called with; None: the first tensor
    index: int | None = None

    @staticmethod
    def input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """The first tensor that a module is called with.

        Args:
            args: positional arguments of the call.
            kwargs: the others.

        Returns:
            The tensor itself.
        """
        return next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))

    @staticmethod
    def inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """All tensors that a module is called with.

        Args:
            args: positional arguments of the call.
            kwargs: the others.

        Returns:
            The tensors themselves, in the order of the call.
        """
        return [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """What of a module's input the site is.

        Args:
            args: positional arguments of the call.
            kwargs: the others.

        Returns:
            The tensor `index` of them, or the first.
        """
        return self.inputs(args, kwargs)[self.index or 0]

    def chosen(self, output: Any) -> torch.Tensor:
        """What of a module's output the site is.

        Args:
            output: what the module returned.

        Returns:
            The entry `index` of it, or its first tensor.
        """
        return self.output(output) if self.index is None else output[self.index]

    @staticmethod
    def output(output: Any) -> torch.Tensor:
        """The first tensor that a module returns.

        Args:
            output: a tensor, or a sequence that has one.

        Returns:
            The tensor itself.
        """
        return (
            output
            if isinstance(output, torch.Tensor)
            else next(v for v in output if isinstance(v, torch.Tensor))
        )


def whole(value: torch.Tensor, batch: Batch) -> torch.Tensor:
    """A value with windows and positions apart, also where the module sees all tokens in a row, or
    one sequence for all.

    Args:
        value: (…, width), of all tokens of a step.
        batch: windows and positions of the step.

    Returns:
        (batch, position, width), a view where that is possible.

    Raises:
        HookError: the value does not have one row for each token.

    Examples:
        >>> whole(torch.zeros(6, 4), (2, 3)).shape
        torch.Size([2, 3, 4])
    """
    if tuple(value.shape[:-1]) == batch:
        return value
    if value.numel() == batch[1] * value.shape[-1]:
        return value.reshape(1, batch[1], value.shape[-1]).expand(*batch, -1)
    if value.numel() != batch[0] * batch[1] * value.shape[-1]:
        raise HookError(
            f"a value of shape {tuple(value.shape)} is not one row for each of "
            f"{batch[0]}×{batch[1]} tokens"
        )
    return value.reshape(*batch, value.shape[-1])


def stream(value: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The residual stream, which may be several side by side, as of hyper-connections.

    Args:
        value: (…, width) as of `whole`, or (batch, position, streams, width).
        batch: windows and positions of the step.

    Returns:
        (batch, position, width), or (batch, position, streams, width).

    Raises:
        HookError: the value does not have one row for each token.

    Examples:
        >>> stream(torch.zeros(2, 3, 4, 8), (2, 3)).shape, stream(torch.zeros(6, 8), (2, 3)).shape
        (torch.Size([2, 3, 4, 8]), torch.Size([2, 3, 8]))
    """
    if value.ndim == 4 and tuple(value.shape[:2]) == batch:
        return value
    return whole(value, batch)


def stream_of(model: nn.Module) -> Read:
    """How the residual stream of a model is read, whose own hidden states have other rows than one
    for each token, or streams side by side that are the first axis.

    Args:
        model: of transformers.

    Returns:
        A function that gives what `stream` does.
    """
    if model not in _streams:
        found = (read for m in model.modules() for has, read in _OTHER_ROWS if has(m))
        _streams[model] = next(found, stream)
    return _streams[model]


_streams: WeakKeyDictionary[nn.Module, Read] = WeakKeyDictionary()


def first_rows(read: Read) -> Read:
    """Read the rows of the tokens alone, where the model has more behind them: Longformer, LED and
    Reformer pad to whole windows of their attention, and ProphetNet's streams of further tokens
    come behind its main one.

    Args:
        read: how these are read.

    Returns:
        A function that gives what `read` does.

    Examples:
        >>> first_rows(whole)(torch.zeros(2, 8, 4), (2, 3)).shape
        torch.Size([2, 3, 4])
    """

    def of_tokens(value: torch.Tensor, batch: Batch) -> torch.Tensor:
        return read(value[:, : batch[1]] if _has_more_rows(value, batch) else value, batch)

    return of_tokens


def _last_rows(value: torch.Tensor, batch: Batch) -> torch.Tensor:
    """CPM-Ant puts a prompt of its own before the tokens."""
    return stream(value[:, -batch[1] :] if _has_more_rows(value, batch) else value, batch)


def _has_more_rows(value: torch.Tensor, batch: Batch) -> bool:
    return value.ndim == 3 and value.shape[0] == batch[0] and value.shape[1] > batch[1]


def _streams_first(value: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Gemma 3n's AltUp keeps its streams as the first axis."""
    return stream(value.movedim(0, 2) if value.ndim == 4 else value, batch)


def _has_rows_behind(module: nn.Module) -> bool:
    pads = hasattr(type(module), "_pad_to_window_size") or pads_to_chunks(module)
    return pads or "ngram" in vars(module)


_OTHER_ROWS: tuple[tuple[Callable[[nn.Module], bool], Read], ...] = (
    (_has_rows_behind, first_rows(stream)),
    (lambda m: "prompt_length" in vars(m), _last_rows),
    (lambda m: "altup_projections" in m._modules, _streams_first),
)


def by_head(heads: int) -> Read:
    """Read a value by heads.

    Args:
        heads: of the value.

    Returns:
        A function that gives (batch, position, heads, head size).

    Examples:
        >>> by_head(2)(torch.zeros(1, 3, 8), (1, 3)).shape
        torch.Size([1, 3, 2, 4])
    """
    return lambda value, batch: whole(value, batch).reshape(*batch, heads, -1)


def columns(start: int, stop: int, heads: int | None = None) -> Read:
    """Read some columns of the width.

    Args:
        start: the first column.
        stop: the column after the last one.
        heads: among which they are divided; None: they are not.

    Returns:
        A function that gives (batch, position, columns), or (batch, position, heads, head size).

    Examples:
        >>> columns(2, 6, heads=2)(torch.zeros(1, 3, 8), (1, 3)).shape
        torch.Size([1, 3, 2, 2])
    """

    def read(value: torch.Tensor, batch: Batch) -> torch.Tensor:
        found = whole(value, batch)[..., start:stop]
        return found if heads is None else found.reshape(*batch, heads, -1)

    return read


def grouped(heads: int, kv_heads: int, size: int, which: str) -> Read:
    """Read queries, keys or values of a projection that has them by key heads.

    Args:
        heads: of the queries.
        kv_heads: of the keys and values.
        size: elements of a head.
        which: `q`, `k` or `v`.

    Returns:
        A function that gives (batch, position, heads, head size), with `kv_heads` for keys and
        values.

    Examples:
        >>> fused = torch.zeros(1, 3, 2 * (2 + 2) * 8)  # 4 heads, 2 key heads, of 8 elements
        >>> grouped(4, 2, 8, "q")(fused, (1, 3)).shape, grouped(4, 2, 8, "v")(fused, (1, 3)).shape
        (torch.Size([1, 3, 4, 8]), torch.Size([1, 3, 2, 8]))
    """
    group = heads // kv_heads

    def read(value: torch.Tensor, batch: Batch) -> torch.Tensor:
        parts = whole(value, batch).reshape(*batch, kv_heads, group + 2, size)
        if which == "q":
            return parts[:, :, :, :group].reshape(*batch, heads, size)
        return parts[:, :, :, group if which == "k" else group + 1]

    return read


EPS = ("eps", "variance_epsilon", "epsilon", "layer_norm_eps", "norm_eps")


def is_norm(module: nn.Module) -> bool:
    """Whether a module's class is a norm by its name.

    Args:
        module: of a model.

    Returns:
        True for LayerNorm, and for a class whose name ends as those of norms do, unless it has
        many parts (Wav2Vec2EncoderStableLayerNorm is an encoder).

    Examples:
        >>> is_norm(nn.RMSNorm(4)), is_norm(nn.Linear(4, 4))
        (True, False)
    """
    name = type(module).__name__.lower()
    if isinstance(module, nn.LayerNorm):
        return True
    parts = len([*module.children()])
    return name.endswith(("norm", "ln", "norm1p")) and parts < 3


class Norm:
    """A norm, with an input that it has had: `scale` and `normalized` are what TransformerLens
    calls so.

    Whether it subtracts the mean is seen by its behaviour: then a shift of the input changes
    nothing. `problem` says why the two cannot be had, and is empty where they can.
    """

    def __init__(self, module: nn.Module, example: torch.Tensor) -> None:
        self.module = module
        eps = next(
            (getattr(module, n) for n in EPS if isinstance(getattr(module, n, None), float)), None
        )
        self._eps = 0.0 if eps is None else eps
        self.problem = f"the epsilon of {type(module).__name__} is not known" if eps is None else ""
        self._centres = self._is_centred(example)

    def _is_centred(self, example: torch.Tensor) -> bool:
        by_name = (
            isinstance(self.module, nn.LayerNorm) or "rms" not in type(self.module).__name__.lower()
        )
        weights = [*self.module.parameters(), example]
        if type(example) is not torch.Tensor or any(w.is_meta for w in weights):
            return by_name  # shapes alone
        forward: Any = self.module.forward
        try:
            with torch.inference_mode():
                given = example[:1].clone()
                found = forward(given)
                shifted = forward(given + 3 * given.float().std().to(given.dtype))
        except (TypeError, RuntimeError, LookupError):
            found = None
        if not isinstance(found, torch.Tensor):
            self.problem = f"{type(self.module).__name__} is not a function of one tensor"
            return by_name
        change = float(
            (shifted - found).float().abs().max() / found.float().abs().max().clamp_min(1e-30)
        )
        return change < 0.2

    def scale(self, x: torch.Tensor) -> torch.Tensor:
        """What the norm divides by: the root of the mean square, and of epsilon; of what is left of
        x without its mean, for LayerNorm.

        Args:
            x: (…, width), an input of the norm.

        Returns:
            (…, 1) in the dtype of x.
        """
        return self._centred(x).pow(2).mean(-1, keepdim=True).add(self._eps).sqrt().to(x.dtype)

    def normalized(self, x: torch.Tensor) -> torch.Tensor:
        """x over its scale, before weight and bias.

        Args:
            x: (…, width), an input of the norm.

        Returns:
            (…, width) in the dtype of x.
        """
        centred = self._centred(x)
        return (centred / centred.pow(2).mean(-1, keepdim=True).add(self._eps).sqrt()).to(x.dtype)

    def _centred(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        return x - x.mean(-1, keepdim=True) if self._centres else x


def norm_sites(norm: Norm | None, reason: str) -> list[Site | str]:
    """Where scale and normalized value of a norm are.

    Args:
        norm: of a model; None: there is none.
        reason: why there is none.

    Returns:
        Two sites, or twice the reason why there is none.
    """
    if norm is None:
        return [reason, reason]
    if norm.problem:
        return [norm.problem, norm.problem]
    return [
        Site(norm.module, "input", lambda x, batch: norm.scale(whole(x, batch))),
        Site(norm.module, "input", lambda x, batch: norm.normalized(whole(x, batch))),
    ]
