"""Which storages are alive at each moment of a computation, and to what they belong.

Works on real tensors and on fake ones, which have shapes and no bytes: so the same code measures a
forward pass and predicts it.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    import torch


TEMPORARIES = "temporaries"


@cache
def _is_composite(operation: Any) -> bool:
    """Whether an operation is made of others; asking PyTorch costs more than many an operation."""
    return operation._can_decompose()


@dataclass(frozen=True)
class Storage:
    """A storage: its bytes, the category that it was marked with, the operation and the module that
    it came from.
    """

    nbytes: int
    category: str
    operation: str
    module: str


@dataclass(frozen=True)
class Peak:
    """The moment of most live bytes: the bytes of each category, and the storages alive then."""

    by_category: Mapping[str, int]
    storages: tuple[Storage, ...]

    @property
    def total(self) -> int:
        """Bytes of all categories."""
        return sum(self.by_category.values())


class LiveStorages(TorchDispatchMode):
    """Follows every storage that an operation makes within the `with` block, from its birth to its
    end.

    Storages that were there before are not counted: weights and inputs. `module` names the module
    that is running. What a kernel allocates and frees within itself is not seen, but for the
    operations of `inside`, which say how much that is. `whole` are composite operations that are
    one kernel on the device that is meant. With `device` (cpu, cuda) storages elsewhere are left
    out.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the wrapper costs 10 µs an operation

    def __init__(
        self,
        module: Callable[[], str] = lambda: "",
        whole: Iterable[Any] = (),
        inside: Mapping[Any, Callable[..., int]] | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        self._whole = frozenset(whole)
        self._inside = dict(inside or {})
        self._device = device
        self.events: list[
            tuple[int, int]
        ] = []  # (number of a storage, its bytes; negative at its end)
        self._module = module
        self._storages: list[Storage] = []
        self._alive: dict[
            int, tuple[weakref.ref[Any], int]
        ] = {}  # by address: the storage and its number

    def ignore(self, tensors: Iterable["torch.Tensor"]) -> None:
        """Leave the storages of these tensors out of the account.

        Args:
            tensors: that are not counted, such as weights.
        """
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._alive[storage._cdata] = (weakref.ref(storage), -1)

    def mark(self, tensor: "torch.Tensor", category: str) -> None:
        """Say to what a tensor's storage belongs; unmarked ones are temporaries.

        Args:
            tensor: made within the block; others are passed over.
            category: under which its bytes are counted.
        """
        entry = self._alive.get(tensor.untyped_storage()._cdata)
        if entry is not None and entry[1] >= 0 and entry[0]() is not None:
            old = self._storages[entry[1]]
            self._storages[entry[1]] = Storage(old.nbytes, category, old.operation, old.module)

    def peak(self, first_event: int = 0, last_event: int | None = None) -> Peak:
        """Find the moment of most live bytes.

        Args:
            first_event: the first moment that counts, an index into `events`.
            last_event: the last one; None: the end.

        Returns:
            The bytes by category, and the storages alive then.
        """
        live = most = 0
        at = -1
        end = None if last_event is None else last_event + 1
        for number, (_, nbytes) in enumerate(self.events[:end]):
            live += nbytes
            if live > most and number >= first_event:
                most, at = live, number
        alive = {n for n, nbytes in self.events[: at + 1] if nbytes > 0}
        alive -= {n for n, nbytes in self.events[: at + 1] if nbytes < 0}
        storages = tuple(self._storages[n] for n in sorted(alive))
        counted: Counter[str] = Counter()
        for storage in storages:
            counted[storage.category] += storage.nbytes
        return Peak(dict(counted), storages)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import torch

        if func is torch.ops.prim.device.default:  # asked often, and a fake tensor knows it
            return getattr(args[0], "fake_device", None) or func(*args, **(kwargs or {}))
        if func not in self._whole and _is_composite(func):
            # under inference mode an operation made of others arrives as one, with the temporaries
            # between them unseen
            with self:
                return func.decompose(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for leaf in (result,) if isinstance(result, torch.Tensor) else tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._born(leaf, func)
        if func in self._inside:
            self._within(self._inside[func](*args), str(func))
        return result

    def _within(self, nbytes: int, operation: str) -> None:
        number = len(self._storages)
        self._storages.append(Storage(nbytes, TEMPORARIES, operation, self._module()))
        self.events += [(number, nbytes), (number, -nbytes)]

    def _born(self, tensor: "torch.Tensor", operation: Any) -> None:
        if self._device is not None and tensor.device.type != self._device:
            return
        storage = tensor.untyped_storage()
        address, nbytes = storage._cdata, storage.nbytes()
        known = self._alive.get(address)
        if (known is not None and known[0]() is not None) or nbytes == 0:
            return
        number = len(self._storages)
        self._storages.append(Storage(nbytes, TEMPORARIES, str(operation), self._module()))
        self.events.append((number, nbytes))

        def ended(_: Any) -> None:
            self.events.append((number, -nbytes))
            # a new storage may have taken the address before this callback runs
            if self._alive.get(address, (None, -1))[1] == number:
                del self._alive[address]

        # a weak reference, since a strong one would keep the storage alive and so change the peak
        self._alive[address] = (weakref.ref(storage, ended), number)
