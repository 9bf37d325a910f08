"""Operators of ONNX that are several of a network's."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ..problem.activation import Activation
from .node import Reading, Refusal


def scaled(activation: Callable[[Reading], tuple[float, str, float]]) -> Callable[[Reading], None]:
    """An activation of ``x`` times a number, times another one."""

    def read(r: Reading) -> None:
        inner, text, outer = activation(r)
        value = r.input()
        shape = r.shape(value)
        if inner != 1:
            value = r.add("mul", [value, r.constant(inner, "inner")], shape)
        value = r.add("activate", [value], shape, activation=text)
        r.end("mul", [value, r.constant(outer, "outer")])

    return read


def selu(r: Reading) -> tuple[float, str, float]:
    return 1.0, f"elu({r.get('alpha', 1.67326319217681884765625)!r})", r.get("gamma", 1.05070102214813232421875)


def celu(r: Reading) -> tuple[float, str, float]:
    alpha = r.get("alpha", 1.0)
    return 1 / alpha, "elu", alpha


def swish(r: Reading) -> None:
    source = r.input()
    scaled = r.add("mul", [source, r.constant(r.get("alpha", 1.0), "alpha")], r.shape(source))
    r.end("mul", [source, r.add("activate", [scaled], r.shape(source), activation="sigmoid")])


def thresholded_relu(r: Reading) -> None:
    r.end("threshold", [r.input(), r.constant(r.get("alpha", 1.0), "alpha")])


def tile(r: Reading) -> None:
    """Every axis with one before it along which it is repeated."""
    source = r.input()
    shape, repeats = r.shape(source), r.integers(1, "repeats") or ()
    parted = r.add("reshape", [source], tuple(part for size in shape for part in (1, size)))
    grown = tuple(part for pair in zip(repeats, shape, strict=True) for part in pair)
    r.end("reshape", [r.add("expand", [parted], grown)])


def gather(r: Reading) -> None:
    """From places that are known: a slice where they follow each other, else what a table says."""
    source = r.input()
    shape = r.shape(source)
    axis = r.axis(r.get("axis", 0), len(shape))
    places = r.array(r.given(1), "indices").astype(np.int64).reshape(-1)
    if places.size and not -shape[axis] <= places.min() <= places.max() < shape[axis]:
        raise Refusal(f"an index outside of {shape[axis]} elements")
    places = places % shape[axis]
    taken = (*shape[:axis], len(places), *shape[axis + 1 :])
    step = int(places[1] - places[0]) if len(places) > 1 else 1
    if step and (np.diff(places) == step).all():
        starts = tuple(int(places[0]) if i == axis else 0 for i in range(len(shape)))
        steps = tuple(step if i == axis else 1 for i in range(len(shape)))
        return r.end("reshape", [r.add("slice", [source], taken, starts=starts, steps=steps)])
    ways = tuple("nearest" if i == axis else "same" for i in range(len(shape)))
    return r.end("reshape", [r.add("resize", [source, r.constant(places, "places")], taken, axes=ways)])


def reduce_in_steps(before: str, mode: str, after: str) -> Callable[[Reading], None]:
    """A reduction of what a function makes of each element, and what another makes of the result."""

    def read(r: Reading) -> None:
        value = r.input()
        shape = r.shape(value)
        axes = r.integers(1, "axes")
        if not axes and r.get("noop_with_empty_axes", 0):
            raise Refusal("a reduction over no axes")
        reduced, keepdims = r.axes(axes or range(len(shape)), len(shape)), bool(r.get("keepdims", 1))
        if before:
            value = r.add(before, [value], shape)
        if not after:
            return r.end("reduce", [value], axes=reduced, keepdims=keepdims, mode=mode)
        out = r.shape(str(r.node.output[0]))
        return r.end(after, [r.add("reduce", [value], out, axes=reduced, keepdims=keepdims, mode=mode)])

    return read


def log_sum_exp(r: Reading) -> None:
    """The largest element is subtracted first, so that no power is too large; where it is infinite, a finite number."""
    source = r.input()
    shape = r.shape(source)
    axes = r.axes(r.integers(1, "axes") or range(len(shape)), len(shape))
    if r.get("noop_with_empty_axes", 0):
        raise Refusal("a reduction over no axes")
    small = tuple(1 if axis in axes else size for axis, size in enumerate(shape))
    largest = r.add("reduce", [source], small, axes=axes, keepdims=True, mode="max")
    most = float(np.finfo(np.float32).max)
    largest = r.add("activate", [largest], small, activation=str(Activation("clip", (-most, most))))
    raised = r.add("exp", [r.add("sub", [source, largest], shape)], shape)
    total = r.add("reduce", [raised], small, axes=axes, keepdims=True, mode="sum")
    r.end("reshape", [r.add("add", [r.add("log", [total], small), largest], small)])


def group_normalization(r: Reading) -> None:
    """Groups of channels are normalised as rows; scale and shift are of channels, before version 21 of groups."""
    source, groups = r.input(), r.get("num_groups")
    shape = r.shape(source)
    parted = r.add("reshape", [source], (shape[0], groups, math.prod(shape[1:]) // groups))
    normal = r.add("normalise", [parted], r.shape(parted), axes=(2,), epsilon=r.get("epsilon", 1e-5))
    vectors = []
    for place in (1, 2):
        vector = np.repeat(r.array(r.given(place), "parameter"), shape[1] // groups if r.opset < 21 else 1)
        vectors.append(r.constant(vector.reshape(-1, *(1,) * (len(shape) - 2)), f"affine{place}"))
    r.end("scale_shift", [r.add("reshape", [normal], shape), *vectors])


def rms_normalization(r: Reading) -> None:
    source = r.input()
    shape = r.shape(source)
    first = r.axis(r.get("axis", -1), len(shape))
    axes, small = tuple(range(first, len(shape))), (*shape[:first], *(1,) * (len(shape) - first))
    total = r.add("reduce", [source], small, axes=axes, keepdims=True, mode="square")
    mean = r.add("mul", [total, r.constant(1 / math.prod(shape[first:]), "share")], small)
    size = r.add("sqrt", [r.add("add", [mean, r.constant(r.get("epsilon", 1e-5), "epsilon")], small)], small)
    r.end("mul", [r.add("div", [source, size], shape), r.input(1)])


def place_of(mode: str) -> Callable[[Reading], None]:
    """The place of the largest or the least element along an axis, the first or the last such; of NaN any place."""

    def read(r: Reading) -> None:
        source = r.input()
        shape, last = r.shape(source), bool(r.get("select_last_index", 0))
        axis = r.axis(r.get("axis", 0), len(shape))
        size, small = shape[axis], tuple(1 if k == axis else n for k, n in enumerate(shape))
        found = r.add("reduce", [source], small, axes=(axis,), keepdims=True, mode=mode)
        places = r.constant(np.arange(size).reshape(-1, *(1,) * (len(shape) - 1 - axis)), "places")
        none = r.constant(0 if last else size - 1, "none")
        candidates = r.add("where", [r.add("equal", [source, found], shape), places, none], shape)
        keepdims = bool(r.get("keepdims", 1))
        r.end("reduce", [candidates], axes=(axis,), keepdims=keepdims, mode="max" if last else "min")

    return read
