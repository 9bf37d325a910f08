"""What oneDNN prints of itself where ``ONEDNN_VERBOSE`` is set: its convolutions as layers.

A line says what was made (``create``) or run (``exec``)::

    onednn_verbose,v1,primitive,exec,cpu,convolution,jit:avx2,forward_inference,src:f32::blocked:acdb::f0 …,
        attr-post-ops:eltwise_relu,alg:convolution_direct,mb1_ic64oc64_ih56oh56kh3sh1dh0ph1_iw56ow56kw3sw1dw0pw1,0.42

Versions differ in what stands before the primitive's name, in the marker at the beginning and in how memory is
described; the fields behind the name are alike from 1.0 on, and so they are counted from there. A layer occurs as often
as it was run; one that was only made occurs once. Lines about other primitives, and about oneDNN itself, say nothing of
layers. The problem and its attributes are benchdnn's notation, almost, and read as that
(:mod:`convgen.formats.benchdnn`).

Source: ``doc/performance_considerations/verbose.md`` of oneDNN, and what users of its versions have reported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from ..errors import SpecError, UnsupportedError
from ..problem.spec import ConvSpec
from . import benchdnn
from .notation import unsupported

_MARKER = re.compile(r"(?:onednn|dnnl|mkldnn)_verbose,")
_PRIMITIVES = {"convolution": False, "deconvolution": True}  # -> transposed
_FORWARD = ("forward_inference", "forward_training", "forward", "forward_scoring")
#: What is computed -> benchdnn's word for it, without a bias and with one. Gradients describe src, weights and dst too:
#: one of them is what they give, the two others are read.
_DIRECTIONS = dict.fromkeys(_FORWARD, ("FWD_I", "FWD_I"))
_DIRECTIONS |= {"backward_data": ("BWD_D", "BWD_D"), "backward_weights": ("BWD_W", "BWD_WB")}
#: What was done. Other lines say what one primitive makes within another, or why something was not made.
_OPERATION = re.compile(r"(exec|create)(?::(?!dispatch|check)\w+)?")
#: ``src:f32:props:blocked:acdb:strides:f0``; before 3.2 ``src_f32::blocked:acdb::f0``, in version 2 without strides.
_MEMORY = re.compile(r"(src|wei|bia|dst)[:_](\w+):[^:]*:(\w*)(?::(\w*))?(?::([\dx]+))?(?::.*)?")
#: Attributes about how a layer is run, and how exact that may be.
_IGNORED = ("attr-scratchpad", "attr-fpmath", "attr-acc-mode", "attr-deterministic", "scratchpad_mode")


class _Memory(NamedTuple):
    dtype: str
    tag: str
    strides: str


def recognise(line: str) -> bool:
    """Whether a line is one of oneDNN's reports about itself."""
    return _MARKER.search(line) is not None


def parse(line: str, where: str) -> Iterable[benchdnn.Outcome]:
    """The layer of a line, how often it ran (0 where it was made), and no names; nothing where it is about no layer."""
    fields = line[_MARKER.search(line).end() :].split(",")  # type: ignore[union-attr]
    place = next((number for number, field in enumerate(fields) if field in _PRIMITIVES), None)
    operations = [match for field in fields[:place] if (match := _OPERATION.fullmatch(field))]
    if place is None or not operations:
        return []
    try:
        return [(_layer(fields[place:], where), int(operations[-1][1] == "exec"), ())]
    except (SpecError, UnsupportedError) as error:
        return [error]


def _layer(fields: list[str], where: str) -> ConvSpec:
    """The layer of the fields from the primitive's name on: implementation, direction, memory, attributes, algorithm,
    problem and, where it is known already, the time.
    """
    if len(fields) < 6:
        expected = "primitive,implementation,prop_kind,memory,attributes,auxiliary,problem"
        raise SpecError("fields", expected, ",".join(fields)[:60], where)
    primitive, _, direction, memory, *rest = fields
    attributes = next((field for field in rest[:1] if not field.startswith("alg:")), "")  # before 1.0 there are none
    word = next((field for field in rest if re.match(r"(g\d+)?mb\d|mb\d+_", field)), "")
    if direction not in _DIRECTIONS:
        raise unsupported(where, "prop_kind", f"one of {', '.join(_DIRECTIONS)}", direction)
    if not word:
        raise SpecError("problem", "one such as mb1_ic64oc64_ih56oh56kh3…", ",".join(rest)[:60], where)
    described = _memory(memory, where)
    src, weights, dst = (described[name] for name in ("src", "wei", "dst"))
    bias = described.get("bia", _Memory("undef", "", ""))
    options = {
        "dir": _DIRECTIONS[direction][bias.dtype != "undef"],
        "dt": f"{src.dtype}:{weights.dtype}:{dst.dtype}",
        "bia-dt": bias.dtype,
        "stag": src.tag or "any",
        "dtag": dst.tag or "any",
    }
    return benchdnn.layer(
        word, options | _attributes(attributes, where), transposed=_PRIMITIVES[primitive], where=where
    )


def _memory(text: str, where: str) -> dict[str, _Memory]:
    found = {}
    for part in text.split():
        match = _MEMORY.fullmatch(part)
        if match is None:
            raise unsupported(where, "memory", "src:f32::blocked:acdb::f0 and the like, of oneDNN 1.0 or later", part)
        name, dtype, kind, tag, strides = match.groups(default="")
        if kind not in ("blocked", "any", "undef", ""):
            raise unsupported(where, f"memory of {name}", "blocked", kind)
        if strides and name in ("src", "dst"):
            raise unsupported(where, f"memory of {name}", "a dense tensor", f"strides {strides}")
        found[name] = _Memory(dtype, tag if kind == "blocked" else "", strides)
    if missing := {"src", "wei", "dst"} - found.keys():
        raise SpecError("memory", "that of src, wei and dst", f"none of {min(missing)}", where)
    return found


def _attributes(text: str, where: str) -> dict[str, str]:
    """Attributes as benchdnn's options."""
    options = {}
    for part in text.replace(";'", "'").split():
        name, _, value = part.partition(":")
        value = value.strip("';").replace(";", "+")
        if name in ("attr-post-ops", "post_ops"):
            options["attr-post-ops"] = value
        elif name in ("attr-oscale", "oscale"):  # before 3.0 one scale for all, or each channel, of dst
            options["attr-scales"] = f"out:{value}"
        elif name in ("attr-scales", "attr-zero-points", "attr-dropout", "attr-rounding-mode"):
            options[name] = value
        elif name not in _IGNORED and value:
            raise unsupported(where, name, "an attribute that a layer has", value)
    return options
