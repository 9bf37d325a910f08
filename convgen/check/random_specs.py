"""Small random layers of every kind, for the fuzzer and for property tests.

Everything is drawn from a :class:`Source`. The fuzzer's is a seeded generator; that of property tests is hypothesis,
which makes a failing example simpler by itself. For its sake, the first of several choices is the plainest.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import SpecError
from ..problem.activation import DEFAULTS, Activation
from ..problem.dtypes import DTYPES, RANGES
from ..problem.layout import BLOCKS
from ..problem.spec import ConvSpec
from ..problem.tokens import ACCURACIES, DIRECTIONS

T = TypeVar("T")

#: What activations are given as parameters.
ACTIVATION_PARAMETERS = (0.25, 0.5, 1.5, 2.5, 3.0, 6.0, -1.0)
#: What i8 layers have in place of what they cannot have.
ONLY_OF_I8 = {"residual": False, "accuracy": "standard"}


class Source(ABC):
    """Where random numbers come from."""

    @abstractmethod
    def integer(self, low: int, high: int) -> int:
        """A number from ``low`` to ``high``, both included."""

    def choice(self, values: Sequence[T]) -> T:
        """One of the values."""
        return values[self.integer(0, len(values) - 1)]

    def chance(self, percent: int) -> bool:
        """True in so many of 100 cases."""
        return self.integer(1, 100) > 100 - percent


class Seeded(Source):
    """Numbers of a generator with a seed."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def integer(self, low: int, high: int) -> int:
        return self.rng.randint(low, high)


@dataclass(frozen=True)
class Limits:
    """How large a layer may be.

    Args:
        channels: per group.
        pixels: input size along an axis, by rank. Where a kernel needs more than that, it gets more.
        taps: of the whole kernel.
        macs: multiply-accumulates.
        elements: of the largest tensor.
    """

    channels: int
    pixels: Mapping[int, int]
    taps: int
    macs: int
    elements: int

    def admit(self, spec: ConvSpec) -> bool:
        """Whether the spec's work and tensors are small enough."""
        few = spec.macs <= self.macs and math.prod(spec.kernel) <= self.taps
        return few and all(math.prod(shape) <= self.elements for shape in spec.shapes.values())


#: Where a layer is compiled: its compilation, not its run, is to take most of the time. Some schedules unroll all
#: taps, and LLVM takes long over many.
SMALL = Limits(channels=130, pixels={1: 150, 2: 30, 3: 9}, taps=125, macs=2_000_000, elements=200_000)


def random_spec(source: Source, limits: Limits, tiles: Sequence[int], dtypes: Sequence[str] = DTYPES) -> ConvSpec:
    """A layer within the limits, of one of some types; most sizes lie at or beside a few of the ``tiles``."""
    while True:
        with suppress(SpecError):  # a transposed convolution that is cropped to nothing
            spec = ConvSpec(**random_fields(source, limits, tiles, dtypes))
            if limits.admit(spec):
                return spec


def in_a_direction(source: Source, spec: ConvSpec, directions: Sequence[str] = ()) -> ConvSpec:
    """The spec, or now and then a gradient of its convolution, where that is of floats.

    Args:
        directions: those to choose from, each as likely as the others; layers of integers have none but ``forward``.
    """
    if spec.is_quantised or (not directions and not source.chance(25)):
        return spec
    direction = source.choice(directions or DIRECTIONS[1:])
    if direction == "forward":
        return spec
    n = max(spec.n, 1) if direction == "weights" else spec.n
    return spec.with_(direction=direction, n=n, residual=False, activation="none")


def random_fields(
    source: Source, limits: Limits, tiles: Sequence[int], dtypes: Sequence[str] = DTYPES
) -> dict[str, Any]:
    """All fields of a layer, of any size; where it is transposed, it may have no output."""
    rank, transposed = source.choice((1, 2, 2, 3)), source.chance(30)
    axes = [_axis(source, transposed) for _ in range(rank)]
    if source.chance(60):
        axes = [dict(axes[0]) for _ in axes]  # alike, but for the size
    for axis in axes:
        if not axis["in_spatial"]:
            size = near_tiles(source, tiles, limits.pixels[rank])
            window = axis["kernel"], axis["stride"], axis["dilation"], axis["padding"]
            axis["in_spatial"] = input_size(source, size, *window, transposed=transposed)
    fields = {
        **_channels(source, limits, tiles),
        **{name: tuple(axis[name] for axis in axes) for name in axes[0]},
        "n": source.choice((1, 1, 1, 1, 2, 2, 0)),
        "transposed": transposed,
        "bias": source.chance(60),
        "residual": source.chance(30),
        "activation": _activation(source),
        "accuracy": source.choice(ACCURACIES),
        "dtype": source.choice(dtypes),
        "layout": source.choice(("nchw", "nhwc")),
    }
    if source.chance(15):
        fields |= _layouts(source, fields)
    if fields["dtype"] == "i8":
        fields |= _integers(source)
    return fields


def _integers(source: Source) -> dict[str, Any]:
    """Types and zero points of an i8 layer's tensors, often all alike and without, and what else it may have."""
    activation = source.choice(("none", "relu", "clip(-20,90)"))
    if source.chance(40):
        return {**ONLY_OF_I8, "activation": activation}
    src, weights, dst = (source.choice(types) for types in (("i8", "u8"), ("i8", "u8"), ("i8", "u8", "i32", "f32")))
    return {
        **ONLY_OF_I8,
        "activation": activation if dst != "i32" else "none",
        "src_dtype": src,
        "weights_dtype": weights,
        "dst_dtype": dst,
        "src_zero": source.chance(50),
        "weights_zero": source.chance(30),
        "dst_zero": dst in RANGES and source.chance(50),
        **(_residual(source) if dst in RANGES else {}),
    }


def _residual(source: Source) -> dict[str, Any]:
    has_one = source.chance(30)
    return {"residual": has_one, "residual_dtype": source.choice(("i8", "u8")) if has_one else ""}


def near_tiles(source: Source, tiles: Sequence[int], most: int) -> int:
    """A size up to ``most``: a few tiles, or one more or less; or a small number."""
    if source.chance(65):
        size = source.choice(tiles) * source.choice((1, 1, 1, 2, 3)) + source.choice((0, 1, -1))
        if 1 <= size <= most:
            return size
    return source.integer(1, min(5, most))


def input_size(
    source: Source,
    size: int,
    kernel: int,
    stride: int,
    dilation: int,
    padding: tuple[int, int],
    *,
    transposed: bool,
) -> int:
    """An axis' input size: ``size`` itself, or such that the output has it; at least what the kernel covers."""
    window, pads = (kernel - 1) * dilation + 1, sum(padding)
    if source.chance(50):
        size = (size + pads - window) // stride + 1 if transposed else (size - 1) * stride + window - pads
    return max(size, 1, 0 if transposed else window - pads)


def _axis(source: Source, transposed: bool) -> dict[str, Any]:
    """What is along one spatial axis; ``in_spatial`` is 0 where any size will do."""
    kernel, dilation = source.choice((1, 1, 1, 2, 3, 3, 3, 4, 5, 7)), source.choice((1, 1, 1, 1, 2, 3))
    stride, size = source.choice((1, 1, 1, 1, 2, 2, 3)), 0
    oddity = source.choice(("", "", "", "", "kernel = input", "dilation", "stride", "padding", "one pixel"))
    if oddity == "kernel = input":
        size, dilation = kernel, 1
    elif oddity == "dilation":  # past the input
        size, kernel = source.integer(1, 4), max(kernel, 2)
        dilation = size + source.integer(1, 2)
    elif oddity == "stride":  # past the kernel
        stride = kernel + source.integer(1, 3)
    elif oddity == "one pixel":
        size = 1
    begin, end = _padding(source, kernel, dilation, size, oddity == "padding", transposed)
    most = max(stride, dilation) - 1
    return {
        "in_spatial": size,
        "kernel": kernel,
        "stride": stride,
        "dilation": dilation,
        "padding": (end, begin) if source.chance(50) else (begin, end),
        "output_padding": source.choice((0, most, source.integer(0, most))) if transposed else 0,
    }


def _padding(source: Source, kernel: int, dilation: int, size: int, large: bool, transposed: bool) -> tuple[int, int]:
    """Two ends' padding: ``large`` is more than the kernel at one; a ``size`` that is fixed gets what it lacks."""
    window = (kernel - 1) * dilation + 1
    if large:
        return kernel + source.integer(1, 3), source.integer(0, kernel + 2)
    if size:
        missing = 0 if transposed else max(0, window - size)
        begin = source.integer(0, missing)
        return begin, missing - begin + source.choice((0, 0, 1))
    same = (window - 1) // 2
    uneven = source.integer(0, same), source.integer(0, window // 2)
    return source.choice(((0, 0), (0, 0), (same, same), uneven))


def _channels(source: Source, limits: Limits, tiles: Sequence[int]) -> dict[str, int]:
    """``ic``, ``oc`` and ``groups``: dense, one channel, grouped or depthwise."""
    kinds = ("dense", "dense", "dense", "dense", "one", "grouped", "grouped", "depthwise", "depthwise")
    kind = source.choice(kinds)
    ic, oc = (near_tiles(source, tiles, limits.channels) for _ in range(2))
    if kind == "one":
        ic, oc = source.choice(((1, oc), (ic, 1), (1, 1)))
    if kind == "grouped":
        groups = source.choice((2, 3, 4, 5))
        if source.chance(40):  # whole vectors of a group, which some schedules ask for
            ic, oc = (tiles[0] * source.choice((1, 1, 2)) for _ in range(2))
        return {"ic": groups * max(ic, 2), "oc": groups * oc, "groups": groups}
    if kind == "depthwise":
        ic = max(ic, 2)
        return {"ic": ic, "oc": ic * source.choice((1, 1, 1, 2, 3)), "groups": ic}
    return {"ic": ic, "oc": oc, "groups": 1}


def _layouts(source: Source, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Layouts of src and of dst, each drawn alone, with channels in whole blocks where one has blocks."""
    layouts = {name: source.choice(list(BLOCKS)) for name in ("layout", "dst_layout")}
    blocks = {name: BLOCKS[layout] or 1 for name, layout in layouts.items()}
    groups, ic, oc = (fields[name] for name in ("groups", "ic", "oc"))

    def whole(channels: int, unit: int) -> int:
        return max(unit, channels // unit * unit)

    if groups == ic > 1:  # depthwise, and stays so
        channels = whole(ic, math.lcm(*blocks.values()))
        return {**layouts, "groups": channels, "ic": channels, "oc": channels * (oc // ic)}
    ic, oc = (whole(c, math.lcm(groups, block)) for c, block in zip((ic, oc), blocks.values(), strict=True))
    return {**layouts, "ic": ic, "oc": oc}


def _activation(source: Source) -> str:
    """None or relu half of the time; where there are parameters, others than the defaults half of the time."""
    name = source.choice(("none", "relu", source.choice(list(DEFAULTS)), source.choice(list(DEFAULTS))))
    if source.chance(50):
        return name
    values = ACTIVATION_PARAMETERS + ((0.0,) if name == "clip" else ())
    params = sorted(source.choice(values) for _ in DEFAULTS[name])
    if name == "clip" and source.chance(25):
        params[1] = math.inf
    return str(Activation(name, tuple(params)))
