"""SeparableSpec: a depthwise convolution and the 1×1 convolution that reads it, as one problem.

Keras calls the two ``SeparableConv1D`` and ``SeparableConv2D``. What is between them is nobody's output, so that it
need never lie in memory as a whole. Like :mod:`convgen.problem.spec` this imports neither NumPy nor TVM.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..errors import SpecError, meant
from .activation import Activation
from .spec import ConvSpec

SEPARABLE = tuple(f"separable{rank}d" for rank in (1, 2, 3))
#: Begins a token of the depthwise convolution; the same word without it is of the pointwise one.
_FIRST = "depthwise_"
_MULTIPLIER = re.compile(r"m([1-9][0-9]{0,17})\Z")
#: Fields that a descriptor says of the pointwise convolution; all others are of the depthwise one, or of both.
_POINTWISE = ("oc", "bias", "activation", "residual", "dst_layout")


@dataclass(frozen=True)
class SeparableSpec:
    """A depthwise convolution, and a 1×1 convolution at stride 1 of what it gives; of f32.

    Args:
        depthwise: ``groups`` are its input channels, each of which gives one or several; neither transposed nor with a
            residual. Its ``layout`` is that of src.
        pointwise: of the other's output; it may have a residual. Its ``dst_layout`` is that of dst.

    Raises:
        SpecError: one of the two is something else, or they do not fit together.
    """

    depthwise: ConvSpec
    pointwise: ConvSpec

    def __post_init__(self) -> None:
        first, second = self.depthwise, self.pointwise
        expected: list[tuple[str, bool, str, object]] = [
            ("depthwise.groups", first.groups == first.ic, f"ic={first.ic}", first.groups),
            ("depthwise.transposed", not first.transposed, "false", True),
            ("depthwise.residual", not first.residual, "false", True),
            ("pointwise.kernel", second.is_pointwise, "one pixel at stride 1, not padded", str(second)),
            ("pointwise.groups", second.groups == 1, "1", second.groups),
            ("pointwise.n", second.n == first.n, f"{first.n}, as many as depthwise has", second.n),
            ("pointwise.ic", second.ic == first.oc, f"{first.oc}, which depthwise gives", second.ic),
            (
                "pointwise.in_spatial",
                second.in_spatial == first.out_spatial,
                f"{first.out_spatial}, which depthwise gives",
                second.in_spatial,
            ),
            ("pointwise.accuracy", second.accuracy == first.accuracy, repr(first.accuracy), repr(second.accuracy)),
        ]
        for name, spec in (("depthwise", first), ("pointwise", second)):
            expected += [
                (f"{name}.dtype", spec.dtype == "f32", "f32", spec.dtype),
                (f"{name}.direction", spec.direction == "forward", "forward", spec.direction),
                (f"{name}.mirrored", not spec.mirrored, "false", True),
            ]
        for name, allowed, what, found in expected:
            if not allowed:
                raise SpecError(name, what, found)
        # In between there is no tensor that anybody sees.
        object.__setattr__(self, "depthwise", first.with_(layout=first.layout, dst_layout="nchw"))
        object.__setattr__(self, "pointwise", second.with_(layout="nchw", dst_layout=second.dst_layout))

    @property
    def parts(self) -> dict[str, ConvSpec]:
        """Both convolutions, by their names."""
        return {"depthwise": self.depthwise, "pointwise": self.pointwise}

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what is bound once: ``depthwise_weights [ic * m, 1, *kernel]``, ``pointwise_weights [oc, ic * m,
        1, …]``, and where there are, ``…_bias`` and ``…_slope`` of either.
        """
        return {f"{part}_{name}": spec.shapes[name] for part, spec in self.parts.items() for name in spec.parameters}

    @property
    def flops(self) -> int:
        """Two per multiply-accumulate of both."""
        return self.depthwise.flops + self.pointwise.flops

    @cached_property
    def descriptor(self) -> str:
        """One line that identifies the problem; :meth:`parse` reads it back."""
        first, second = self.depthwise, self.pointwise
        taken = {name: getattr(second, name) for name in _POINTWISE}
        operator, *words = first.with_(**taken, groups=1).descriptor.split()
        if first.oc != first.ic:
            words.append(f"m{first.oc // first.ic}")
        if first.bias:
            words.append(f"{_FIRST}bias")
        if first.activation != "none":
            words.append(f"{_FIRST}{first.activation}")
        return " ".join([operator.replace("conv", "separable"), *words])

    @property
    def name(self) -> str:
        """A C identifier made from the descriptor, short enough for the names of files."""
        stand_in = re.sub(r"\W+", "_", self.descriptor.replace("-", "m").replace(".", "d")).strip("_")
        return stand_in if len(stand_in) <= 200 else f"{stand_in[:160].rstrip('_')}_{self.pointwise.key[:16]}"

    def __str__(self) -> str:
        return self.descriptor

    def __repr__(self) -> str:
        return f"SeparableSpec.parse({self.descriptor!r})"

    def with_accuracy(self, accuracy: str) -> SeparableSpec:
        """The same in another accuracy class."""
        return replace(self, **{name: spec.with_(accuracy=accuracy) for name, spec in self.parts.items()})

    @classmethod
    def parse(cls, text: str) -> SeparableSpec:
        """Read a descriptor such as ``separable2d n1 ic32 oc64 i56x56 k3x3 s1x1 p1x1 depthwise_relu6 relu6 nhwc``.

        The tokens are those of :class:`ConvSpec`: sizes, kernel, stride, padding and dilation of the depthwise
        convolution, ``oc``, ``nobias``, ``residual`` and activation of the pointwise one. ``m2`` gives each input
        channel two of those in between, ``depthwise_bias`` a bias to the depthwise convolution, and
        ``depthwise_relu6`` an activation.

        Raises:
            SpecError: a token is malformed, unknown, repeated or missing, or the convolutions do not fit together.
        """
        operator, *tokens = text.split() or [text]
        if operator not in SEPARABLE:
            raise SpecError("operator", f"one of {', '.join(SEPARABLE)}", f"{operator!r}{meant(operator, SEPARABLE)}")
        own, words = dict[str, Any](), [operator.replace("separable", "conv")]
        for token in tokens:
            name, value = _own(token)
            if not name:
                words.append(token)
            elif name in own:
                raise SpecError(token, f"{name} at most once", "a second one")
            else:
                own[name] = value
        whole, multiplier = ConvSpec.parse(" ".join(words)), own.pop("multiplier", 1)
        if whole.groups > 1:
            raise SpecError("g", "none, as each input channel is a group", whole.groups)
        between = whole.ic * multiplier
        own = {"bias": False, "activation": "none", **own}
        first = whole.with_(groups=whole.ic, oc=between, residual=False, dst_layout="nchw", **own)
        one: dict[str, Any] = {"kernel": 1, "stride": 1, "dilation": 1, "padding": 0}
        one |= {"layout": "nchw", "dst_layout": whole.dst_layout}
        return cls(first, whole.with_(ic=between, in_spatial=first.out_spatial, **one))


def _own(token: str) -> tuple[str, Any]:
    """A token of the depthwise convolution alone as its field and value; no field of any other."""
    if match := _MULTIPLIER.match(token):
        return "multiplier", int(match[1])
    if not token.startswith(_FIRST):
        return "", None
    word = token.removeprefix(_FIRST)
    return ("bias", True) if word == "bias" else ("activation", str(Activation.parse(word)))
