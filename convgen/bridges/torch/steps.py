"""Steps of optimisers, which change weights uncounted where they are fused: PyTorch's versions miss those."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook


class Steps:
    """Which step of any optimiser was the last that may have changed a tensor's memory.

    Attributes:
        total: steps so far.
    """

    def __init__(self) -> None:
        self.total = 0
        self._last: dict[int, int] = {}
        self._lock = threading.Lock()

    def of(self, tensor: Tensor) -> int:
        """The last step that may have changed what lies in a tensor's memory, by whatever tensor; 0 where none has."""
        return self._last.get(tensor.untyped_storage().data_ptr(), 0) if self._last else 0

    def of_all(self, tensors: Iterable[Tensor]) -> list[int]:
        """Of each."""
        return [self.of(tensor) for tensor in tensors]

    def count(self, optimizer: Any, *_: Any) -> None:
        """A step has been taken. PyTorch's own optimisers leave what has no gradient as it is."""
        theirs = type(optimizer).__module__.startswith("torch.optim.")
        changed = [
            tensor.untyped_storage().data_ptr()
            for group in optimizer.param_groups
            for tensor in group["params"]
            if tensor.device.type == "cpu" and not (theirs and tensor.grad is None)
        ]
        with self._lock:
            # The tensors first: who sees the total grown shall find them.
            self._last |= dict.fromkeys(changed, self.total + 1)
            self.total += 1


#: Of this process, from when this module is imported: before anything is packed.
steps = Steps()


def _count(optimizer: Any, *_: Any) -> None:
    steps.count(optimizer)


# Not traced, where a step is compiled; torch.compiler.disable would import PyTorch's compiler now.
register_optimizer_step_post_hook(torch._disable_dynamo(_count))
