"""Weights packed once for as long as they stay what they are, for each kernel that reads them.

Where they change from step to step, what is packed anew takes the memory of what was packed before: new memory is
zeroed page by page first, which can take as long as packing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...kernel.kernel import Kernel
from ...kernel.library import Bytes
from .steps import steps

#: Elements of a tensor that are looked at, besides its version and steps, before what was packed of it is used again.
LOOKED_AT = 64
#: Integers by their bytes, which all bits can be seen as.
_BITS = {2: torch.int16, 4: torch.int32}


class _State(NamedTuple):
    """What a tensor's values are known by. PyTorch counts changes, but not those by optimisers that are fused, whose
    steps are counted here, nor those through ``.data``: some of the elements show these, which is enough for whatever
    changes all of them.
    """

    address: int
    version: int
    step: int
    elements: bytes


#: The states of a weight and of a bias.
_States = tuple[_State | None, ...]


class _Packed:
    """What was packed, and how many calls use it at the moment."""

    def __init__(self, of: _States, layer: Any) -> None:
        self.of, self.layer, self.users = of, layer, 1


class _OfWeight:
    """What was packed of a weight, for each kernel, and memory of what is no longer its values."""

    def __init__(self) -> None:
        self.packed: dict[Kernel, _Packed] = {}
        self._spare: list[Bytes] = []

    def memory(self, kernel: Kernel, of: _States) -> Bytes | None:
        """Memory that no call reads, for a kernel to pack into; None where there is none of that size."""
        stale = [other for other, packed in self.packed.items() if packed.of[0] != of[0] or other is kernel]
        if stale:  # what of the spare memory was not taken since the last change is not needed
            dropped = [self.packed.pop(other) for other in stale]
            self._spare = [packed.layer.packed for packed in dropped if not packed.users]
        size = kernel.sizes().packed
        for index, memory in enumerate(self._spare):
            if memory.size == size:
                return self._spare.pop(index)
        return None


#: By weight, and gone with it.
_packed = WeakTensorKeyDictionary()
_lock = Lock()


@contextmanager
def layer_of(kernel: Kernel, weight: Tensor, bias: Tensor | None = None) -> Iterator[Any]:
    """The kernel's layer with these weights, for a call: packed, unless those it packed last are the same."""
    if weight.is_inference() or (bias is not None and bias.is_inference()):  # they have no version
        yield _bound(kernel, weight, bias, None)
        return
    of = (_state(weight), None if bias is None else _state(bias))
    with _lock:
        known: _OfWeight = _packed.setdefault(weight, _OfWeight())
        found = known.packed.get(kernel)
        if found is not None and found.of == of:
            found.users += 1
        else:
            memory, found = known.memory(kernel, of), None
    if found is None:
        found = _Packed(of, _bound(kernel, weight, bias, memory))
        with _lock:
            known.packed[kernel] = found
    try:
        yield found.layer
    finally:
        with _lock:
            found.users -= 1


def _state(tensor: Tensor) -> _State:
    bits = tensor.detach().view(_BITS[tensor.element_size()]).numpy().ravel(order="K")
    seen = bits[:: max(1, bits.size // LOOKED_AT)]
    return _State(tensor.data_ptr(), tensor._version, steps.of(tensor), seen.tobytes())


def _bound(kernel: Kernel, weight: Tensor, bias: Tensor | None, memory: Bytes | None) -> Any:
    """A layer whose packed weights never leave this process."""
    given = (weight.detach(), None if bias is None else bias.detach())
    return kernel.bind(*given, packed=memory, checksum=False)
