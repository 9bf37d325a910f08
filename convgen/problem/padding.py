"""Padding as it is given, by number, by pairs, by a word or by the size of the output, as pairs of numbers.

ONNX's ``auto_pad`` and, of transposed convolutions, ``output_shape`` (operators Conv and ConvTranspose).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ..errors import SpecError
from .fields import Pair, Spatial, integer, spatial
from .tokens import PADDING_WORDS


class Sizes(Protocol):
    """What of a spec its padding follows from: everything per spatial axis, ``padding`` as it was given."""

    @property
    def transposed(self) -> bool: ...
    @property
    def in_spatial(self) -> Spatial: ...
    @property
    def window(self) -> Spatial: ...
    @property
    def stride(self) -> Spatial: ...
    @property
    def dilation(self) -> Spatial: ...
    @property
    def output_padding(self) -> Spatial: ...
    @property
    def padding(self) -> Any: ...


def resolved_padding(spec: Sizes, wanted: Any) -> tuple[tuple[Pair, ...], Spatial]:
    """Padding and output padding of a spec whose other sizes are checked, per spatial axis.

    Args:
        wanted: size of a transposed convolution's output per axis, or None.

    Raises:
        SpecError: a word is unknown, a number is none, or no padding gives ``wanted``.
    """
    rank, word = len(spec.in_spatial), spec.padding if isinstance(spec.padding, str) else None
    if word is not None and word not in PADDING_WORDS:
        raise SpecError("padding", f"a number, pairs or one of {', '.join(PADDING_WORDS)}", repr(word))
    if wanted is not None:
        if not spec.transposed:
            raise SpecError("output_spatial", "None unless transposed", repr(wanted))
        wanted = spatial("output_spatial", wanted, rank, 1)
    if word in (None, "valid") and wanted is None:
        return _pairs(0 if word else spec.padding, rank), spec.output_padding
    pairs, extras = [], []
    for axis in range(rank):
        size, stride, extra = spec.in_spatial[axis], spec.stride[axis], spec.output_padding[axis]
        window = spec.window[axis]
        if spec.transposed:
            target = wanted[axis] if wanted is not None else size * stride
            total = (size - 1) * stride + extra + window - target
            if total < 0:  # the output is longer than the windows reach: output padding extends its end
                extra, total = extra - total, 0
                if extra >= max(stride, spec.dilation[axis]):
                    raise SpecError(f"output_spatial[{axis}]", "a size the windows reach", target)
        else:
            target = -(-size // stride)
            total = max(0, (target - 1) * stride + window - size)
        small = total // 2
        # Of an odd total, ONNX's SAME_UPPER puts the larger half at the end, everything else at the beginning.
        pairs.append((small, total - small) if word == "same" else (total - small, small))
        extras.append(extra)
    return tuple(pairs), tuple(extras)


def _pairs(value: object, rank: int) -> tuple[Pair, ...]:
    """Padding given as an integer, one per axis, or a (begin, end) per axis."""
    if hasattr(value, "__index__"):
        p = integer("padding", value, 0)
        return ((p, p),) * rank
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise SpecError("padding", f"an integer, {rank} values, (begin, end) pairs or {PADDING_WORDS}", repr(value))
    axes = list(value) * rank if len(value) == 1 else list(value)
    if len(axes) != rank:
        raise SpecError("padding", f"{rank} values, one per spatial axis", f"{len(axes)}: {value!r}")
    pairs = []
    for axis, item in enumerate(axes):
        name = f"padding[{axis}]"
        if hasattr(item, "__index__"):
            p = integer(name, item, 0)
            pairs.append((p, p))
        elif isinstance(item, Sequence) and not isinstance(item, str) and len(item) == 2:
            pairs.append((integer(name, item[0], 0), integer(name, item[1], 0)))
        else:
            raise SpecError(name, "an integer or a (begin, end) pair", repr(item))
    return tuple(pairs)
