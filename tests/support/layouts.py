"""Tensors of every layout as ``[n, channel, *spatial]`` and back, block by block, without convgen's formula."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
LAYOUTS = ("nchw", "nhwc", "nchw8c", "nchw16c")


def block_of(layout: str) -> int:
    """Channels of a block that the name gives; 0 where it has none."""
    match = re.fullmatch(r"nchw(\d+)c", layout)
    return int(match[1]) if match else 0


def channels_first(array: Array, layout: str) -> Array:
    if layout == "nhwc":
        return np.moveaxis(array, -1, 1)
    if not block_of(layout):
        return array
    return np.concatenate([np.moveaxis(array[:, part], -1, 1) for part in range(array.shape[1])], axis=1)


def stored(array: Array, layout: str) -> Array:
    if layout == "nhwc":
        return np.moveaxis(array, 1, -1)
    if not (block := block_of(layout)):
        return array
    parts = np.split(array, array.shape[1] // block, axis=1)
    return np.stack([np.moveaxis(part, 1, -1) for part in parts], axis=1)
