"""Convolutions of numbers of 64 bits and their gradients, by their definition, in NumPy: slow, and what
``torch.autograd.gradcheck`` needs.

Of every layer ``outer[n, o, p] = sum over c, k of inner[n, c, p * stride + k * dilation - begin] * weight[o, c, k]``,
group by group: of a convolution inner is its input, of a transposed one its output. One of the three is computed from
the other two.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Relation:
    """How the three belong together; sizes of spatial axes."""

    inner: Sequence[int]
    outer: Sequence[int]
    kernel: Sequence[int]
    stride: Sequence[int]
    dilation: Sequence[int]
    begin: Sequence[int]
    groups: int

    @property
    def _room(self) -> list[int]:
        """Of inner with all that the taps reach."""
        axes = zip(self.inner, self.outer, self.kernel, self.stride, self.dilation, self.begin, strict=True)
        return [max(b + i, (o - 1) * s + (k - 1) * d + 1) for i, o, k, s, d, b in axes]

    @property
    def _inside(self) -> tuple[Any, ...]:
        return (..., *(slice(b, b + i) for b, i in zip(self.begin, self.inner, strict=True)))

    def taps(self) -> Iterator[tuple[Any, Any]]:
        """The index of every tap in the weights, and that of the pixels of inner, with its padding, that it reads."""
        for tap in itertools.product(*map(range, self.kernel)):
            axes = zip(tap, self.outer, self.stride, self.dilation, strict=True)
            yield (..., *tap), (..., *(slice(t * d, t * d + (o - 1) * s + 1, s) for t, o, s, d in axes))

    def padded(self, inner: Array) -> Array:
        """``[n, group, channel, *spatial]`` with zeros around it."""
        parted = self.parted(inner)
        made = np.zeros((*parted.shape[:3], *self._room))
        made[self._inside] = parted
        return made

    def cropped(self, padded: Array) -> Array:
        return self.joined(np.ascontiguousarray(padded[self._inside]))

    def parted(self, tensor: Array) -> Array:
        """``[n, group, channel, *spatial]``."""
        n, channels, *spatial = tensor.shape
        return tensor.reshape(n, self.groups, channels // self.groups, *spatial)

    def joined(self, parted: Array) -> Array:
        """The inverse of :meth:`parted`."""
        n, groups, channels, *spatial = parted.shape
        return parted.reshape(n, groups * channels, *spatial)

    def weights(self, weight: Array) -> Array:
        """``[group, channel of outer, channel of inner, *kernel]``."""
        return weight.reshape(self.groups, -1, *weight.shape[1:])


def _outer(inner: Array, weight: Array, relation: _Relation) -> Array:
    padded, weights = relation.padded(inner), relation.weights(weight)
    made = np.zeros((len(inner), relation.groups, weights.shape[1], *relation.outer))
    for tap, pixels in relation.taps():
        made += np.einsum("ngc...,goc->ngo...", padded[pixels], weights[tap])
    return relation.joined(made)


def _inner(outer: Array, weight: Array, relation: _Relation) -> Array:
    parted, weights = relation.parted(outer), relation.weights(weight)
    made = relation.padded(np.zeros((len(outer), relation.groups * weights.shape[2], *relation.inner)))
    for tap, pixels in relation.taps():
        made[pixels] += np.einsum("ngo...,goc->ngc...", parted, weights[tap])
    return relation.cropped(made)


def _weight(inner: Array, outer: Array, relation: _Relation) -> Array:
    padded, parted = relation.padded(inner), relation.parted(outer)
    made = np.zeros((relation.groups, parted.shape[2], padded.shape[2], *relation.kernel))
    for tap, pixels in relation.taps():
        made[tap] = np.einsum("ngox,ngcx->goc", _flat(parted), _flat(padded[pixels]))
    return made.reshape(-1, *made.shape[2:])


def _flat(parted: Array) -> Array:
    """The pixels of images as one axis."""
    return parted.reshape(*parted.shape[:3], math.prod(parted.shape[3:]))


def _relation(x: Sequence[int], y: Sequence[int], weight: Sequence[int], options: Sequence[Any]) -> _Relation:
    stride, padding, dilation, transposed, _, groups = options
    inner, outer = (y, x) if transposed else (x, y)
    return _Relation(inner[2:], outer[2:], weight[2:], stride, dilation, padding[::2], groups)


def convolution(x: Array, weight: Array, bias: Array | None, shape: Sequence[int], options: Sequence[Any]) -> Array:
    """What ``convgen::convolution`` is, of arrays of f64.

    Args:
        shape: of the output.
        options: as the operator has them, from ``stride`` on.
    """
    relation = _relation(x.shape, shape, weight.shape, options)
    made = (_inner if options[3] else _outer)(x, weight, relation)
    return made if bias is None else made + bias.reshape(-1, *[1] * (x.ndim - 2))


def gradient_of_input(gradient: Array, x: Sequence[int], weight: Array, options: Sequence[Any]) -> Array:
    """The gradient of an input of the shape ``x``."""
    relation = _relation(x, gradient.shape, weight.shape, options)
    return (_outer if options[3] else _inner)(gradient, weight, relation)


def gradient_of_weight(gradient: Array, x: Array, weight: Sequence[int], options: Sequence[Any]) -> Array:
    """The gradient of a weight of the shape ``weight``."""
    relation = _relation(x.shape, gradient.shape, weight, options)
    inner, outer = (gradient, x) if options[3] else (x, gradient)
    return _weight(inner, outer, relation)
