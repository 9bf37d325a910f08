"""What one convolution node of an ONNX graph means, as fields of a spec."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...errors import ConvgenError, SpecError, UnsupportedError
from ...problem.spec import ConvSpec

if TYPE_CHECKING:
    import numpy.typing as npt
    from onnx import NodeProto


@dataclass(frozen=True)
class OnnxLayer:
    """A node that convolves as it was read.

    Attributes:
        name: the node's, or that of its output; inside a function or subgraph with the path to it.
        operator: ``Conv``, ``ConvTranspose``, ``QLinearConv``, ``ConvInteger``, or another one, which is refused.
        spec: what it computes with everything folded; None where it was refused.
        refusal: why it was refused; None where it was not.
        src, dst, residual: the model's values that these tensors of the spec are; "" where there is none.
        arrays: ``weights [bias] [slope] [scale]`` of the spec, as ``kernel.bind`` takes them; empty unless asked for,
            and where one of them is known only when the model runs.
        unknown: why arrays that were asked for are not known.
    """

    name: str
    operator: str
    spec: ConvSpec | None
    refusal: ConvgenError | None = None
    src: str = ""
    dst: str = ""
    residual: str = ""
    arrays: dict[str, npt.NDArray[Any]] = field(default_factory=dict, compare=False, repr=False)
    unknown: str = ""


# ---- other nodes that convolve ----------------------------------------------------------------

#: Words in the names of operators that convolve, of any domain: ``DeformConv``, ``aten::conv2d``, ``DCNv2``.
_CONVOLVES = re.compile(r"conv(?!ert|ersion|erg|ex|ey)|dcn(?:v\d|$)", re.IGNORECASE)
_REASONS = {
    "DeformConv": "its windows move with offsets that are computed",
    "CausalConvWithState": "it has a state that is passed on",
    "ConvTransposeWithDynamicPads": "its padding is given when it runs",
}
_DOMAINS = {
    "com.microsoft.nchwc": "blocked for one processor by ONNX Runtime's last optimisations; give the model as it was, "
    "or one optimised as far as ORT_ENABLE_EXTENDED",
    "com.ms.internal.nhwc": "of ONNX Runtime's own, with another layout of its weights",
}


def convolves(node: NodeProto) -> bool:
    """Whether a node convolves by its name; those of PyTorch's ATen say it in an attribute."""
    called = [a.s.decode(errors="replace") for a in node.attribute if a.name in ("operator", "name", "func_name")]
    generic = node.op_type in ("ATen", "ATenOp", "PythonOp", "PyOp", "ExternalOp")
    return any(map(_CONVOLVES.search, [node.op_type, *(called if generic else [])]))


def why_unread(node: NodeProto) -> str:
    """Why a node that convolves is not one that is read."""
    if reason := _REASONS.get(node.op_type):
        return f"{reason}; no layer has that"
    domain = node.domain or "ai.onnx"
    ends = [a.s.decode(errors="replace") for a in node.attribute if a.name == "activation"]
    what = f"{domain!r} that ends with {ends[0]!r}" if ends else repr(domain)
    return f"an operator of the domain {what}, {_DOMAINS.get(domain, 'which is not known here')}"


# ---- what a node means ------------------------------------------------------------------------


def convolution_fields(
    op: str, attributes: Mapping[str, Any], src: tuple[int, ...], weights: tuple[int, ...], bias: bool, where: str
) -> dict[str, Any]:
    """What a Conv or ConvTranspose means, as ConvSpec's fields.

    Args:
        op: the node's operator.
        attributes: the node's, by name; strings as text, absent ones left out.
        src, weights: the operands' shapes.
        bias: whether there is one.
        where: leads the message of an UnsupportedError.

    Raises:
        SpecError: an attribute or shape does not fit the others.
        UnsupportedError: other than 1 to 3 spatial axes, or padding that ONNX leaves open.
    """
    rank = len(weights) - 2
    if not 1 <= rank <= 3:
        raise UnsupportedError(f"{where}: weights {list(weights)} have {rank} spatial axes; 1 to 3 are supported")
    transposed = op == "ConvTranspose"
    groups = attributes.get("group", 1)
    if len(src) != rank + 2:
        raise SpecError("src", f"{rank + 2} axes as the weights have", list(src))
    channels = (weights[0], weights[1] * groups) if transposed else (weights[1] * groups, weights[0])
    if channels[0] != src[1]:
        raise SpecError("weights", f"{src[1]} input channels as src has (group={groups})", list(weights))
    kernel = tuple(attributes.get("kernel_shape", weights[2:]))
    if kernel != weights[2:]:
        raise SpecError("kernel_shape", f"the weights' {list(weights[2:])}", list(kernel))
    for name in ("strides", "dilations", "output_padding"):
        if len(attributes.get(name, kernel)) != rank:
            raise SpecError(name, f"{rank} values", attributes[name])
    fields: dict[str, Any] = {
        "n": src[0],
        "ic": channels[0],
        "oc": channels[1],
        "in_spatial": src[2:],
        "kernel": kernel,
        "stride": tuple(attributes.get("strides", [1] * rank)),
        "dilation": tuple(attributes.get("dilations", [1] * rank)),
        "groups": groups,
        "transposed": transposed,
        "bias": bias,
        "padding": _padding(attributes, rank),
    }
    if transposed:
        fields["output_padding"] = tuple(attributes.get("output_padding", [0] * rank))
        if wanted := attributes.get("output_shape"):
            if len(wanted) not in (rank, rank + 2):  # ONNX Runtime takes batch and channels in front, too
                raise SpecError("output_shape", f"{rank} values", wanted)
            fields["output_spatial"] = tuple(wanted[-rank:])
        elif str(fields["padding"]).startswith("same"):
            window = [(k - 1) * d + 1 for k, d in zip(kernel, fields["dilation"], strict=True)]
            if any(s > w for s, w in zip(fields["stride"], window, strict=True)):
                # The text says input * stride; shape inference and ONNX Runtime take less.
                raise UnsupportedError(f"{where}: auto_pad=SAME_* with strides above the window; give pads")
    return fields


def _padding(attributes: Mapping[str, Any], rank: int) -> Any:
    """``auto_pad`` and ``pads`` as ConvSpec's padding."""
    word = attributes.get("auto_pad", "NOTSET")
    words = {"SAME_UPPER": "same", "SAME_LOWER": "same_lower", "VALID": "valid"}
    if word in words:
        return words[word]
    if word not in ("NOTSET", ""):
        raise SpecError("auto_pad", f"NOTSET or one of {', '.join(words)}", repr(word))
    pads = attributes.get("pads", [0] * (2 * rank))
    if len(pads) != 2 * rank:
        raise SpecError("pads", f"{2 * rank} values, begins and ends", list(pads))
    return tuple(zip(pads[:rank], pads[rank:], strict=True))
