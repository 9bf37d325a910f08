"""Weights packed once for as long as they stay what they are, for each kernel that reads them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...kernel.kernel import Kernel
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


class _Packed(NamedTuple):
    of: tuple[_State | None, ...]
    layer: Any


#: What was packed of a weight, for each kernel; gone with the weight.
_packed = WeakTensorKeyDictionary()


def layer_of(kernel: Kernel, weight: Tensor, bias: Tensor | None = None) -> Any:
    """The kernel's layer with these weights: packed, unless those it packed last are the same."""
    if weight.is_inference() or (bias is not None and bias.is_inference()):  # they have no version
        return _bound(kernel, weight, bias)
    of = (_state(weight), None if bias is None else _state(bias))
    known: dict[Kernel, _Packed] = _packed.setdefault(weight, {})
    found = known.get(kernel)
    if found is None or found.of != of:
        for stale in [other for other, packed in list(known.items()) if packed.of[0] != of[0]]:
            known.pop(stale, None)
        # In memory of its own: what was packed before may be in use by another thread.
        found = known[kernel] = _Packed(of, _bound(kernel, weight, bias))
    return found.layer


def _state(tensor: Tensor) -> _State:
    bits = tensor.detach().view(_BITS[tensor.element_size()]).numpy().ravel(order="K")
    seen = bits[:: max(1, bits.size // LOOKED_AT)]
    return _State(tensor.data_ptr(), tensor._version, steps.of(tensor), seen.tobytes())


def _bound(kernel: Kernel, weight: Tensor, bias: Tensor | None) -> Any:
    return kernel.bind(weight.detach(), None if bias is None else bias.detach())
