"""ConvSpec: what a convolution is, independent of how it is computed.

A spec means ONNX's ``Conv`` / ``ConvTranspose`` (cross-correlation) followed by bias, residual and
activation: ``dst = activation(conv(src, weights) + bias + residual)``. Of 8-bit integers it means ``QLinearConv``:
``dst = saturate(round(activation((conv(src - src_zero, weights - weights_zero) + bias) * scale)) + dst_zero)``, where
the sum is a 32-bit integer, the rest f32, ties are rounded to even and ``scale`` is a tensor ``[oc]``; with a residual,
that and then ``QLinearAdd``; see ``docs/quantised.md``.

Of another direction it means the gradient of a layer, whose own fields say the shapes: see ``docs/gradients.md``.

This module imports neither NumPy nor TVM, so that the command line can refuse a wrong spec at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from ..errors import SpecError, meant
from .activation import Activation
from .dtypes import BYTES, DTYPES, QUANTISED, RANGES
from .fields import INT32_MAX, Pair, Spatial, flag, integer, layout_of, spatial
from .hashing import hashed_once
from .layout import Blocks
from .padding import resolved_padding
from .tokens import ACCURACIES, ACCURACY, DIRECTIONS, DST, FLAGS, SIZES, ZEROS, joined, read_token

#: Version of the canonical form. A new field with a neutral default does not change it.
CANONICAL_VERSION = 1

OPERATORS = tuple(f"{op}{rank}d" for op in ("conv", "convtranspose") for rank in (1, 2, 3))
#: Tensors that are bound once, in the order in which functions take them.
PARAMETERS = ("weights", "bias", "slope", "scale", "src_zero", "weights_zero", "dst_zero", "sum")
#: Numbers of the parameter ``sum``: scales, in steps of dst, and zero points of the product, which is rounded to dst's
#: type, and of the residual.
SUM = ("product_scale", "product_zero", "residual_scale", "residual_zero")
#: What scales among them count as that are larger, or less than its negative: no sum is then too large for an i32.
MOST_SUM_SCALE = 2.0**20

#: Types of single tensors. Fields that are resolved where they are empty -> the field whose value they get.
TYPES = ("src_dtype", "weights_dtype", "dst_dtype", "residual_dtype")
RESOLVED = {"dst_layout": "layout", **dict.fromkeys(TYPES, "dtype")}


@hashed_once
@dataclass(frozen=True)
class ConvSpec:
    """One convolution layer with static shapes.

    Args:
        n: batch; 0 is allowed and gives an empty output.
        ic, oc: input and output channels of the whole layer (not per group).
        in_spatial: input size per spatial axis, without padding; its length (1-3) is the rank.
        kernel: kernel size per spatial axis.
        stride, dilation: per axis, 1 = dense. One number stands for all axes.
        padding: ``(begin, end)`` per axis; also one number, one number per axis, ``"valid"``,
            ``"same"`` (ONNX SAME_UPPER) or ``"same_lower"``; stored resolved. Of a transposed
            convolution it is what is cropped from the output.
        groups: divides ``ic`` and ``oc``; ``groups == ic`` is a depthwise convolution.
        transposed: ONNX ConvTranspose instead of Conv.
        output_padding: rows added at the end of a transposed output, below max(stride, dilation).
        output_spatial: of a transposed convolution, the wanted output size; resolves the padding
            as ONNX's ``output_shape`` does (the larger half at the beginning, or at the end where
            padding is ``"same"``).
        bias: whether a bias ``[oc]`` is added.
        activation: ``none relu relu6 leaky_relu(a) prelu clip(lo,hi) sigmoid tanh silu mish
            hardswish hardsigmoid(a,b) elu(a) gelu gelu_tanh``.
        residual: whether a tensor of the output's shape is added before the activation.
        accuracy: the class of its error bound (:mod:`convgen.problem.accuracy`): ``strict``, ``standard``,
            ``relaxed``, or ``tf32`` or ``bf16``, whose products may be of operands of 11 or 8 bits.
        dtype: how tensors are stored: ``f32``, ``f16`` or ``bf16``; sums are f32 whatever it is. Or ``i8``: a layer
            of 8-bit integers, whose sums and bias are i32 and whose scale is f32 (:attr:`dtypes`). It is exact,
            takes no activation but ``relu`` and ``clip``, and no accuracy but ``standard``. Its residual is of 8-bit
            integers, too; a parameter ``sum`` says what these mean (:data:`SUM`).
        layout: of src: ``nchw`` (1-D ``ncw``, 3-D ``ncdhw``), ``nhwc``, or in blocks of 8 or 16 channels,
            ``nchw8c`` or ``nchw16c``, of which ic is a multiple (:mod:`convgen.problem.layout`).
            Weights are always ``[oc, ic/groups, *kernel]``, transposed ``[ic, oc/groups, *kernel]``.
        dst_layout: of dst and residual; src's where it is empty or None. Stored resolved.
        src_dtype, weights_dtype: of an i8 layer, ``i8`` or ``u8``; dtype where empty. Stored resolved.
        dst_dtype: of an i8 layer, ``i8`` or ``u8``, ``i32``: the sums themselves, without scale and activation, or
            ``f32``: what would be rounded.
        residual_dtype: of an i8 layer's residual, ``i8`` or ``u8``; dtype where empty. Stored resolved.
        src_zero, weights_zero, dst_zero: whether an i8 layer's tensor has a zero point: the stored number that means
            0, of the tensor's own type; ``[1]``, of weights ``[oc]``. src is padded with its zero point.
        direction: ``forward``; ``data``, the gradient of the layer's src: the kernel's src is then the gradient of the
            layer's dst, its dst that of the layer's src; or ``weights``, the gradient of its weights: the kernel
            reads the gradient of the layer's dst beside src, as ``residual``, and takes no weights; its dst has the
            weights' shape, or where there is a bias, is flat, the gradient of bias ``[oc]`` after that of weights. Of
            floats, without activation and residual; ``data`` has no bias: it is stored as false. ``weights`` has
            no empty batch.
        mirrored: weights are stored as those of the layer whose gradient of src this is: ``[ic, oc/groups, *kernel]``,
            taps in the opposite order. Of a forward convolution that is not transposed, of floats.

    Raises:
        SpecError: a field is not what it must be, or the fields do not fit together.
    """

    n: int
    ic: int
    oc: int
    in_spatial: Spatial
    kernel: Spatial
    stride: Spatial = 1  # type: ignore[assignment]
    padding: tuple[Pair, ...] = 0  # type: ignore[assignment]
    dilation: Spatial = 1  # type: ignore[assignment]
    groups: int = 1
    transposed: bool = False
    output_padding: Spatial = 0  # type: ignore[assignment]
    bias: bool = True
    activation: str = "none"
    residual: bool = False
    accuracy: str = "standard"
    dtype: str = "f32"
    layout: str = "nchw"
    dst_layout: str = ""
    src_dtype: str = ""
    weights_dtype: str = ""
    dst_dtype: str = ""
    residual_dtype: str = ""
    src_zero: bool = False
    weights_zero: bool = False
    dst_zero: bool = False
    direction: str = "forward"
    mirrored: bool = False
    output_spatial: InitVar[Any] = field(default=None, kw_only=True)

    def __post_init__(self, output_spatial: Any) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("n", integer("n", self.n, 0))
        for name in ("ic", "oc", "groups"):
            put(name, integer(name, getattr(self, name), 1))
        raw = self.in_spatial
        if hasattr(raw, "__index__"):
            raw = (raw,)  # type: ignore[assignment]
        if isinstance(raw, str) or not isinstance(raw, Sequence) or not 1 <= len(raw) <= 3:
            raise SpecError("in_spatial", "1, 2 or 3 sizes", repr(self.in_spatial))
        rank = len(raw)
        put("in_spatial", spatial("in_spatial", raw, rank, 1))
        for name, minimum in (("kernel", 1), ("stride", 1), ("dilation", 1), ("output_padding", 0)):
            put(name, spatial(name, getattr(self, name), rank, minimum))
        for name in ("transposed", "bias", *FLAGS):
            put(name, flag(name, getattr(self, name)))
        put("activation", str(Activation.parse(self.activation)))
        for name, known in (("accuracy", ACCURACIES), ("dtype", DTYPES), ("direction", DIRECTIONS)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                raise SpecError(name, f"one of {', '.join(known)}", f"{value!r}{meant(str(value), known)}")
        put("bias", self.bias and self.direction != "data")
        for name in TYPES:
            put(name, getattr(self, name) or self.dtype)
        put("layout", layout_of("layout", self.layout, rank))
        same = self.dst_layout is None or (isinstance(self.dst_layout, str) and not self.dst_layout)
        put("dst_layout", layout_of("dst_layout", self.layout if same else self.dst_layout, rank))

        for name, channels in (("ic", self.ic), ("oc", self.oc)):
            if channels % self.groups:
                raise SpecError("groups", f"a divisor of {name}={channels}", self.groups)
        for name, blocks in (("ic", Blocks(self.layout, self.ic)), ("oc", Blocks(self.dst_layout, self.oc))):
            if blocks.channels % blocks.size:
                raise SpecError(name, f"a multiple of {blocks.size}, the blocks of {blocks.layout}", blocks.channels)
        for axis, extra in enumerate(self.output_padding):
            limit = max(self.stride[axis], self.dilation[axis])
            if extra and not self.transposed:
                raise SpecError("output_padding", "0 unless transposed", self.output_padding)
            if extra >= limit > 0 and extra:
                raise SpecError(f"output_padding[{axis}]", f"below max(stride, dilation) = {limit}", extra)
        padding, output_padding = resolved_padding(self, output_spatial)
        put("padding", padding)
        put("output_padding", output_padding)
        self._check_sizes()
        self._check_types()
        self._check_direction()

    def _check_sizes(self) -> None:
        for axis, size in enumerate(self.out_spatial):
            if size >= 1:
                continue
            if self.transposed:
                raise SpecError(f"padding[{axis}]", "less than the transposed output", self.padding[axis])
            padded = self.in_spatial[axis] + sum(self.padding[axis])
            raise SpecError(
                f"kernel[{axis}]", f"a dilated kernel within the padded input ({padded})", self.window[axis]
            )
        for name, shape in (
            ("src", (self.n, self.ic, *self.padded_spatial)),
            ("weights", self.weights_shape),
            ("dst", (self.n, self.oc, *self.out_spatial)),
        ):
            if math.prod(shape) > INT32_MAX:
                raise SpecError(name, f"at most {INT32_MAX} elements (int32 indexing)", f"shape {shape}")

    def _check_types(self) -> None:
        """That tensors have types and zero points only where they are integers, which take less than floats."""
        for tensor, known in QUANTISED.items():
            name, expected = f"{tensor}_dtype", known if self.is_quantised else (self.dtype,)
            if (dtype := getattr(self, name)) not in expected:
                raise SpecError(name, f"one of {', '.join(expected)} with dtype {self.dtype}", repr(dtype))
            if tensor != "residual" and getattr(self, f"{tensor}_zero") and dtype not in RANGES:
                raise SpecError(f"{tensor}_zero", f"false for {tensor} of {dtype}", True)
        if not self.residual and self._differs("residual_dtype"):
            raise SpecError("residual_dtype", f"{self.dtype} without a residual", repr(self.residual_dtype))
        if not self.is_quantised:
            return
        plain = self.activation == "none" or (self.dst_dtype != "i32" and self.activation_op.name in ("relu", "clip"))
        for name, why, allowed in (
            ("residual", "false where dst is of i32 or f32", not self.residual or self.dst_dtype in RANGES),
            (
                "activation",
                "none, relu or clip for i8, of i32 none, as others do not commute with rounding to it",
                plain,
            ),
            ("accuracy", "standard for i8, which is exact", self.accuracy == "standard"),
        ):
            if not allowed:
                raise SpecError(name, why, getattr(self, name))

    def _check_direction(self) -> None:
        """That gradients are of what has one, and mirrored weights a convolution's."""
        of_floats = "one of f32, f16, bf16"
        expected: list[tuple[str, bool, str]] = []
        if self.direction != "forward":
            without = f"with direction {self.direction}"
            expected += [
                ("dtype", not self.is_quantised, f"{of_floats} {without}"),
                ("activation", self.activation == "none", f"none {without}, which is of the convolution alone"),
                ("residual", not self.residual, f"false {without}"),
                ("mirrored", not self.mirrored, f"false {without}"),
                ("n", self.n > 0 or self.direction != "weights", f"1 or more {without}"),
            ]
        if self.mirrored:
            expected += [
                ("transposed", not self.transposed, "false with mirrored"),
                ("dtype", not self.is_quantised, f"{of_floats} with mirrored"),
            ]
        for name, allowed, what in expected:
            if not allowed:
                raise SpecError(name, what, repr(getattr(self, name)))

    # ---- shapes -------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.in_spatial)

    @property
    def operator(self) -> str:
        return f"{'convtranspose' if self.transposed else 'conv'}{self.rank}d"

    @property
    def window(self) -> Spatial:
        """Extent of the dilated kernel per axis."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True))

    @property
    def padded_spatial(self) -> Spatial:
        """Input size per axis with its padding (transposed: the input as it is)."""
        if self.transposed:
            return self.in_spatial
        return tuple(size + b + e for size, (b, e) in zip(self.in_spatial, self.padding, strict=True))

    @cached_property
    def out_spatial(self) -> Spatial:
        """Output size per axis (ONNX Conv / ConvTranspose)."""
        if self.transposed:
            return tuple(
                (size - 1) * s + extra + w - b - e
                for size, s, extra, w, (b, e) in zip(
                    self.in_spatial, self.stride, self.output_padding, self.window, self.padding, strict=True
                )
            )
        return tuple((p - w) // s + 1 for p, w, s in zip(self.padded_spatial, self.window, self.stride, strict=True))

    @property
    def src_spatial(self) -> Spatial:
        """Size per axis of src: of the tensor that a kernel reads, whatever the direction."""
        return self.out_spatial if self.direction == "data" else self.in_spatial

    @property
    def dst_spatial(self) -> Spatial:
        """Size per axis of dst; with direction ``weights``, of the gradient that is read beside src."""
        return self.in_spatial if self.direction == "data" else self.out_spatial

    @property
    def src_blocks(self) -> Blocks:
        """How src lies in memory."""
        return Blocks(self.dst_layout, self.oc) if self.direction == "data" else Blocks(self.layout, self.ic)

    @property
    def dst_blocks(self) -> Blocks:
        """How dst and residual lie in memory; with direction ``weights``, the residual alone."""
        return Blocks(self.layout, self.ic) if self.direction == "data" else Blocks(self.dst_layout, self.oc)

    @property
    def src_shape(self) -> Spatial:
        """Shape of src in its layout."""
        return self.src_blocks.shape(self.n, self.src_spatial)

    @property
    def dst_shape(self) -> Spatial:
        """Shape of dst and residual in their layout; with direction ``weights``, of the gradients."""
        if self.direction == "weights":
            return (math.prod(self.weights_shape) + self.oc,) if self.bias else self.weights_shape
        return self.dst_blocks.shape(self.n, self.dst_spatial)

    @property
    def weights_shape(self) -> Spatial:
        """Of the layer: ``[oc, ic/groups, *kernel]``, transposed ``[ic, oc/groups, *kernel]``."""
        if self.transposed:
            return (self.ic, self.oc // self.groups, *self.kernel)
        return (self.oc, self.ic // self.groups, *self.kernel)

    @property
    def shapes(self) -> dict[str, Spatial]:
        """Shape of each tensor by name: :data:`PARAMETERS` between src and ``[residual] dst``; the ones it lacks are
        absent.
        """
        if self.direction == "weights":
            gradient = self.dst_blocks.shape(self.n, self.dst_spatial)
            return {"src": self.src_shape, "residual": gradient, "dst": self.dst_shape}
        weights = (self.ic, self.oc // self.groups, *self.kernel) if self.mirrored else self.weights_shape
        shapes = {"src": self.src_shape, "weights": weights}
        if self.bias:
            shapes["bias"] = (self.oc,)
        if self.has_slope:
            shapes["slope"] = (self.oc,)
        if self.is_quantised and self.dst_dtype != "i32":
            shapes["scale"] = (self.oc,)
        zeros = {"src_zero": (1,), "weights_zero": (self.oc,), "dst_zero": (1,)}
        shapes |= {name: shape for name, shape in zeros.items() if getattr(self, name)}
        if self.residual:
            shapes |= {"sum": (len(SUM),)} if self.is_quantised else {}
            shapes["residual"] = self.dst_shape
        return {**shapes, "dst": self.dst_shape}

    @property
    def dtypes(self) -> dict[str, str]:
        """How each tensor of :attr:`shapes` is stored."""
        own = {"src": self.src_dtype, "weights": self.weights_dtype, "dst": self.dst_dtype}
        if self.is_quantised:
            own |= {f"{name}_zero": dtype for name, dtype in own.items()}
            own |= {"residual": self.residual_dtype, "bias": "i32", "scale": "f32", "sum": "f32"}
        return {name: own.get(name, self.dtype) for name in self.shapes}

    @property
    def parameters(self) -> list[str]:
        """The tensors that are bound once, of :data:`PARAMETERS`."""
        return [name for name in PARAMETERS if name in self.shapes]

    @cached_property
    def activation_op(self) -> Activation:
        return Activation.parse(self.activation)

    @property
    def has_slope(self) -> bool:
        """Whether a slope tensor ``[oc]`` is bound with the weights (prelu)."""
        return self.activation == "prelu"

    @property
    def is_quantised(self) -> bool:
        """A layer of 8-bit integers."""
        return self.dtype == "i8"

    @property
    def is_plainly_quantised(self) -> bool:
        """A convolution from i8 to i8 whose zero points are 0, without residual: what every schedule knows."""
        plain = {self.src_dtype, self.weights_dtype, self.dst_dtype} == {"i8"} and not self.transposed
        zeros = self.src_zero or self.weights_zero or self.dst_zero
        return self.is_quantised and plain and not zeros and not self.residual

    @property
    def out_pixels(self) -> int:
        return math.prod(self.out_spatial)

    @property
    def has_unit_kernel(self) -> bool:
        """A 1x1 kernel without padding, not transposed: each output pixel reads a single input pixel."""
        return not self.transposed and set(self.kernel) == {1} and not any(map(any, self.padding))

    @property
    def is_pointwise(self) -> bool:
        """A unit kernel at stride 1: a matrix product over the flat pixels."""
        return self.has_unit_kernel and set(self.stride) == {1}

    @property
    def is_depthwise(self) -> bool:
        return self.groups == self.ic > 1

    @cached_property
    def core(self) -> ConvSpec:
        """The spec that schedules lower: the same buffers under the simplest shape.

        A gradient of src is a layer, wherever it is one (:attr:`as_layer`). A pointwise convolution of any rank is a
        1-D one over its flat pixels (of NHWC to NHWC: the batch's too). An empty batch is lowered like a batch of one,
        whose kernel is then never entered.
        """
        core = (self if self.n else self.with_(n=1)).as_layer
        if not core.is_pointwise:
            return core
        images_follow = core.layout == core.dst_layout == "nhwc"
        n, pixels = (1, core.n * core.out_pixels) if images_follow else (core.n, core.out_pixels)
        one: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}
        return core.with_(n=n, in_spatial=(pixels,), kernel=(1,), **one)

    @property
    def as_layer(self) -> ConvSpec:
        """A gradient of src as the layer that it is; the spec itself where it is another, or none.

        That of a convolution is the transposed one of the same weights; at stride 1 the convolution of them mirrored,
        as long as it is padded by less than its window. That of a transposed convolution is the convolution, unless
        output padding reaches past a stride and what is cropped from the end: that would be padding below 0.
        """
        if self.direction != "data":
            return self
        changes: dict[str, Any] = {"ic": self.oc, "oc": self.ic, "in_spatial": self.out_spatial}
        changes |= {"layout": self.dst_layout, "dst_layout": self.layout, "direction": "forward"}
        axes = list(zip(self.padding, self.window, self.stride, self.output_padding, strict=True))
        if self.transposed:
            ends = [end - (extra if extra >= stride else 0) for (_, end), _, stride, extra in axes]
            if min(ends) < 0:
                return self
            changes["padding"] = tuple((begin, end) for ((begin, _), *_), end in zip(axes, ends, strict=True))
            return self.with_(transposed=False, output_padding=0, **changes)
        if set(self.stride) == {1} and all(max(pads) < window for pads, window, _, _ in axes):
            changes["padding"] = tuple((window - 1 - b, window - 1 - e) for (b, e), window, _, _ in axes)
            return self.with_(mirrored=True, **changes)
        left = [(p - w) % s for p, w, s in zip(self.padded_spatial, self.window, self.stride, strict=True)]
        return self.with_(transposed=True, output_padding=tuple(left), **changes)

    # ---- cost ---------------------------------------------------------------------------------

    @property
    def macs(self) -> int:
        """Multiply-accumulates, padding included; transposed: over the input, no inserted zeros."""
        pixels = math.prod(self.in_spatial) if self.transposed else self.out_pixels
        return self.n * pixels * math.prod(self.weights_shape)

    @property
    def flops(self) -> int:
        """Two per multiply-accumulate; bias, residual and activation are not counted."""
        return 2 * self.macs

    @property
    def reduction_length(self) -> int:
        """Products summed into one output element, at most."""
        if self.direction == "weights":
            return self.n * math.prod(self.in_spatial if self.transposed else self.out_spatial)
        return (self.oc if self.direction == "data" else self.ic) // self.groups * math.prod(self.kernel)

    @cached_property
    def bytes(self) -> dict[str, int]:
        """Bytes of each tensor of the layer; the ones it lacks are absent."""
        dtypes = self.dtypes
        return {name: BYTES[dtypes[name]] * math.prod(shape) for name, shape in self.shapes.items()}

    # ---- identity -----------------------------------------------------------------------------

    @property
    def canonical(self) -> dict[str, Any]:
        """The versioned canonical form: JSON values, without fields at their default or resolved to another's."""
        form: dict[str, Any] = {"version": CANONICAL_VERSION}
        default = ConvSpec(self.n, self.ic, self.oc, (1,) * self.rank, (1,) * self.rank)
        for name, value in self.to_dict().items():
            required = name in ("n", "ic", "oc", "in_spatial", "kernel") or name in RESOLVED
            if required or value != _listed(getattr(default, name)):
                form[name] = value
        return form

    @cached_property
    def key(self) -> str:
        """SHA-256 of the canonical form, hexadecimal."""
        text = json.dumps(self.canonical, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def descriptor(self) -> str:
        """One line that identifies the spec; :meth:`parse` reads it back."""
        words = [self.operator, f"n{self.n}", f"ic{self.ic}", f"oc{self.oc}"]
        if self.groups > 1:
            words.append(f"g{self.groups}")
        words += [joined("i", self.in_spatial), joined("k", self.kernel), joined("s", self.stride)]
        words.append("p" + "x".join(str(b) if b == e else f"{b}_{e}" for b, e in self.padding))
        if set(self.dilation) != {1}:
            words.append(joined("d", self.dilation))
        if any(self.output_padding):
            words.append(joined("op", self.output_padding))
        if not self.bias and self.direction != "data":
            words.append("nobias")
        if self.direction != "forward":
            words.append(self.direction)
        words += [name for name in FLAGS if getattr(self, name)]
        words += [f"{name.removesuffix('dtype')}{getattr(self, name)}" for name in TYPES if self._differs(name)]
        for name, neutral in (("activation", "none"), ("dtype", "f32"), ("layout", "nchw"), ("accuracy", "standard")):
            if (word := getattr(self, name)) != neutral:
                words.append(f"{ACCURACY}{word}" if name == "accuracy" and word in DTYPES else word)
            if name == "layout" and self._differs("dst_layout"):
                words.append(f"{DST}{self.dst_layout}")
        return " ".join(words)

    @property
    def name(self) -> str:
        """A C identifier made from the descriptor, short enough for the names of files."""
        words = self.descriptor.replace("-", "m").replace(".", "d")
        name = re.sub(r"\W+", "_", words).strip("_")
        return name if len(name) <= 200 else f"{name[:160].rstrip('_')}_{self.key[:16]}"

    def __str__(self) -> str:
        return self.descriptor

    def __repr__(self) -> str:
        return f"ConvSpec.parse({self.descriptor!r})"

    @classmethod
    def parse(cls, text: str) -> ConvSpec:
        """Read a descriptor such as ``conv2d n1 ic64 oc64 i56x56 k3x3 s1x1 p1x1 relu``.

        The operator comes first; the other tokens follow in any order, each at most once. ``i8`` is the dtype where
        it cannot be the input's size: in 1-D, where another token gives that.

        Raises:
            SpecError: a token is malformed, unknown, repeated or missing, or the spec is wrong.
        """
        tokens = text.split()
        word = tokens[0] if tokens else text
        if word not in OPERATORS:
            raise SpecError("operator", f"one of {', '.join(OPERATORS)}", f"{word!r}{meant(word, OPERATORS)}")
        values: dict[str, Any] = {"transposed": tokens[0].startswith("convtranspose")}
        rank = int(tokens[0][-2])
        sizes = [token for token in tokens if SIZES.match(token)]
        if "i8" in sizes and (rank > 1 or len(sizes) > 1):  # in 1-D it is a size, too
            tokens.remove("i8")
            values["dtype"] = "i8"
        for token in tokens[1:]:
            name, value = read_token(token, rank)
            if name in values:
                raise SpecError(token, f"{name} at most once", "a second one")
            values[name] = value
        for name, letter in (("ic", "ic"), ("oc", "oc"), ("in_spatial", "i"), ("kernel", "k")):
            if name not in values:
                raise SpecError(name, f"a token {letter}…", "none")
        return cls(**{"n": 1, **values})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "") -> ConvSpec:
        """A spec from field names and JSON/TOML/YAML values.

        Raises:
            SpecError: a key is unknown or missing, or a value is wrong; ``where`` leads its message.
        """
        known = {f.name for f in fields(cls)} | {"output_spatial"}
        try:
            for key in values:
                if key not in known:
                    raise SpecError(
                        str(key), f"one of {', '.join(sorted(known))}", f"an unknown key{meant(str(key), known)}"
                    )
            for name in ("ic", "oc", "in_spatial", "kernel"):
                if name not in values:
                    raise SpecError(name, "a value", "none")
            return cls(**{"n": 1, **values})
        except SpecError as error:
            raise SpecError(error.field, error.expected, error.found, where or error.where) from None

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values, but those that are resolved to another's value; :meth:`from_dict` reads them."""
        values = {f.name: _listed(getattr(self, f.name)) for f in fields(self)}
        return {name: value for name, value in values.items() if name not in RESOLVED or self._differs(name)}

    def _differs(self, name: str) -> bool:
        """Whether a field of :data:`RESOLVED` is another than what it is where it is empty."""
        return bool(getattr(self, name) != getattr(self, RESOLVED[name]))

    def with_(self, **changes: Any) -> ConvSpec:
        """A copy with some fields changed; checked like a new one. Where dst's layout is src's, it stays so; types and
        zero points of single tensors go with another dtype, that of a residual with the residual.
        """
        if "layout" in changes and self.dst_layout == self.layout:
            changes = {"dst_layout": "", **changes}
        if changes.get("dtype", self.dtype) != self.dtype:
            changes = {**dict.fromkeys(TYPES, ""), **dict.fromkeys(ZEROS, False), **changes}
        if not changes.get("residual", self.residual):
            changes = {"residual_dtype": "", **changes}
        return replace(self, output_spatial=None, **changes)


def _listed(value: Any) -> Any:
    return [_listed(v) for v in value] if isinstance(value, tuple) else value
