"""MIOpenDriver command lines: ``./bin/MIOpenDriver conv -n 1 -c 64 -H 56 -W 56 -k 64 -y 3 -x 3 -p 1 -q 1``.

Also as MIOpen logs them with ``MIOPEN_ENABLE_LOGGING_CMD=1``, after a prefix. Convolutions have two
axes, or three with ``--spatial_dim 3``, never one. What is left out has MIOpenDriver's default. ``-c``
is what goes in and ``-k`` what comes out, whether the mode is ``conv`` or ``trans``. ``convint8`` is of i8, and gives
its sums, of i32; it has neither scales nor a bias. Commands about other primitives, such as ``pool`` and ``bnorm``, say
nothing of layers.

Source: ``driver/conv_driver.hpp``, ``driver/InputFlags.cpp``, ``src/convolution.cpp`` and
``src/driver_arguments.cpp`` in MIOpen.
"""

from __future__ import annotations

import re
from typing import Any

from ..errors import SpecError
from ..problem.layout import PLAIN
from ..problem.spec import ConvSpec
from ..problem.tokens import DIRECTIONS
from .notation import check_said, plain, unsupported

_LINE = re.compile(
    r"(?P<prefix>.*?)(?:^|[\s/\\])MIOpenDriver(?:\.exe)?\s+(?P<command>\w+)(?P<flags>(?:\s.*)?)"
    r"|\s*(?P<bare>conv(?:b?fp16|int8|b?fp8)?)(?P<rest>\s+-.*)",
    re.DOTALL,
)
#: How commands begin that run convolutions, alone or with others in one kernel.
_CONVOLUTIONS = ("conv", "CBAInfer")
_DTYPES = {"conv": "f32", "convfp16": "f16", "convbfp16": "bf16", "convint8": "i8"}

#: Flags that describe the layer: long name -> short name and default.
_FLAGS: dict[str, tuple[str, str]] = {
    "spatial_dim": ("_", "2"),
    "mode": ("m", "conv"),
    "forw": ("F", "0"),
    "batchsize": ("n", "100"),
    "in_channels": ("c", "3"),
    "out_channels": ("k", "32"),
    "group_count": ("g", "1"),
    "in_d": ("!", "32"),
    "in_h": ("H", "32"),
    "in_w": ("W", "32"),
    "fil_d": ("@", "3"),
    "fil_h": ("y", "3"),
    "fil_w": ("x", "3"),
    "pad_d": ("$", "0"),
    "pad_h": ("p", "0"),
    "pad_w": ("q", "0"),
    "conv_stride_d": ("#", "1"),
    "conv_stride_h": ("u", "1"),
    "conv_stride_w": ("v", "1"),
    "dilation_d": ("^", "1"),
    "dilation_h": ("l", "1"),
    "dilation_w": ("j", "1"),
    "trans_output_pad_d": ("%", "0"),
    "trans_output_pad_h": ("Y", "0"),
    "trans_output_pad_w": ("X", "0"),
    "pad_mode": ("z", "default"),
    "bias": ("b", "0"),
    "in_layout": ("I", ""),
    "out_layout": ("O", ""),
}
#: Flags that change what is computed unless they have their default.
_NEUTRAL = {
    "pad_val": ("r", "0"),
    "tensor_vect": ("Z", "0"),
    "vector_length": ("L", "1"),
    "in_cast_type": ("U", "-1"),
    "out_cast_type": ("T", "-1"),
    "wei_cast_type": ("R", "-1"),
}
#: Flags about how it is run and measured, about data, and how the weights are laid out.
_IGNORED = {
    "fil_layout": "f",
    "iter": "i",
    "verify": "V",
    "verification_cache": "C",
    "time": "t",
    "wall": "w",
    "search": "s",
    "printconv": "P",
    "dump_output": "o",
    "in_data": "d",
    "weights": "e",
    "in_bias": "a",
    "dout_data": "D",
    "solution": "S",
    "gpualloc": "G",
}
_LONG = {short: name for name, (short, _) in (_FLAGS | _NEUTRAL).items()} | {s: name for name, s in _IGNORED.items()}


def recognise(line: str) -> bool:
    """Whether a line is, or ends in, a command for MIOpenDriver, be it about another primitive."""
    return _LINE.match(line) is not None


def parse(line: str, where: str = "") -> ConvSpec:
    """The layer of a command; of a command for several directions, the first of forward, data and weights.

    Raises:
        SpecError: a flag is unknown, has no value or a wrong one; names it.
        UnsupportedError: no forward convolution of ours is meant; names the flag.
    """
    layers = parse_all(line, where)
    if not layers:
        raise SpecError("command", "MIOpenDriver conv", repr(line[:40]), where)
    return layers[0]


def parse_all(line: str, where: str = "") -> list[ConvSpec]:
    """The layer of a command in all its directions: ``-F`` is 1 for forward, 2 for data, 4 for weights, or a sum of
    them. 0, the default, which runs all three, is read as the layer itself, forward. None of a command about another
    primitive.

    Raises:
        SpecError, UnsupportedError: as :func:`parse`.
    """
    match = _LINE.match(line)
    if match is None:
        raise SpecError("command", "MIOpenDriver conv", repr(line[:40]), where)
    command = match["command"] or match["bare"]
    if not command.startswith(_CONVOLUTIONS):
        return []
    if command not in _DTYPES:
        raise unsupported(where, "command", f"one of {', '.join(_DTYPES)}", command)
    flags = _flags(match["flags"] or match["rest"] or "", where)
    for name, (_, neutral) in _NEUTRAL.items():
        if flags[name] != neutral:
            raise unsupported(where, name, neutral, flags[name])

    def number(name: str) -> int:
        if not re.fullmatch("-?[0-9]{1,18}", flags[name]):
            raise SpecError(name, "an integer", repr(flags[name]), where)
        return int(flags[name])

    chosen = number("forw") or 1
    if not 1 <= chosen <= 7:
        raise unsupported(where, "forw", "0 to 7", chosen)
    if (rank := number("spatial_dim")) not in (2, 3):
        raise unsupported(where, "spatial_dim", "2 or 3", rank)
    axes = "dhw"[3 - rank :]
    transposed = flags["mode"] == "trans"
    groups = max(number("group_count"), 1)
    for name, known in (("mode", ("conv", "trans")), ("pad_mode", ("default", "same", "valid"))):
        if flags[name] not in known:
            raise SpecError(name, f"one of {', '.join(known)}", repr(flags[name]), where)
    if transposed and groups > 1 and "LogCmd" in (match["prefix"] or ""):
        # MIOpen logs the second size of the weights, its driver takes it for the whole layer's channels.
        raise unsupported(where, "out_channels", "no transposed, grouped convolution in a log", flags["out_channels"])
    fields: dict[str, Any] = {
        "n": number("batchsize"),
        "ic": number("in_channels"),
        "oc": number("out_channels"),
        "in_spatial": [number(f"in_{axis}") for axis in axes],
        "kernel": [number(f"fil_{axis}") for axis in axes],
        "stride": [number(f"conv_stride_{axis}") for axis in axes],
        "dilation": [number(f"dilation_{axis}") for axis in axes],
        "groups": groups,
        "transposed": transposed,
        "bias": number("bias") != 0,
        "dtype": _DTYPES[command],
        "layout": _layout(flags, rank, where),
    }
    pads = [number(f"pad_{axis}") for axis in axes]
    if transposed:
        extras = [number(f"trans_output_pad_{axis}") for axis in axes]
        for axis, extra, stride in zip(axes, extras, fields["stride"], strict=True):
            if extra >= stride:
                raise SpecError(f"trans_output_pad_{axis}", f"less than the stride, {stride}", extra, where)
        fields |= {"output_padding": extras}
    elif set(fields["dilation"]) == {1} or set(fields["kernel"]) == {1}:
        sizes = zip(fields["in_spatial"], fields["kernel"], fields["stride"], pads, strict=True)
        pads = [_pad(flags["pad_mode"], *axis) for axis in sizes]
    if fields["dtype"] == "i8":
        if fields["bias"]:
            raise unsupported(where, "bias", "0 with convint8, whose bias would be of i8", flags["bias"])
        fields |= {"dst_dtype": "i32"}
    directions = [direction for bit, direction in enumerate(DIRECTIONS) if chosen >> bit & 1]
    return [ConvSpec.from_dict(fields | {"padding": pads, "direction": one}, where) for one in directions]


def _flags(text: str, where: str) -> dict[str, str]:
    """The value of every flag by its long name. As in MIOpenDriver, the last of several counts."""
    values = {name: default for name, (_, default) in (_FLAGS | _NEUTRAL).items()}
    words = iter(word.strip("\"'") for word in text.split() if word != "\\")  # the backslash of a continued line
    for flag in words:
        name = flag[2:] if flag.startswith("--") else _LONG.get(flag[1:], "") if flag.startswith("-") else ""
        if name not in values and name not in _IGNORED:
            raise SpecError(flag, "a flag of MIOpenDriver conv", "an unknown one", where)
        value = next(words, None)
        if value is None:
            raise SpecError(flag, "a value", "none", where)
        values[name] = value
    return values


def _layout(flags: dict[str, str], rank: int, where: str) -> str:
    known = {"NCHW": "nchw", "NHWC": "nhwc"} if rank == 2 else {"NCDHW": "nchw", "NDHWC": "nhwc"}
    layouts = {}
    for name in ("in_layout", "out_layout"):
        text = flags[name].upper() or next(iter(known))
        if text not in known:
            raise unsupported(where, name, f"one of {', '.join(known)}", text)
        layouts[name] = known[text]
    if layouts["in_layout"] != layouts["out_layout"]:
        raise unsupported(
            where, "out_layout", f"the layout of the input, {layouts['in_layout']}", layouts["out_layout"]
        )
    return layouts["in_layout"]


def _pad(mode: str, size: int, kernel: int, stride: int, pad: int) -> int:
    """Padding on both sides of an axis; MIOpenDriver's "same" is half of what ONNX pads in all, rounded down."""
    if mode == "valid":
        return 0
    if mode == "same" and stride > 0:
        return max(kernel - (size % stride or stride), 0) // 2
    return pad


def write(spec: ConvSpec) -> str:
    """The command of a layer, which :func:`parse` reads as :func:`~convgen.formats.notation.plain` of the spec.

    Raises:
        UnsupportedError: MIOpenDriver cannot say a field; names it.
    """
    said = plain(spec)
    if spec.rank == 1:
        raise unsupported("", "in_spatial", "2 or 3 sizes for MIOpenDriver", spec.in_spatial)
    for name, layout in (("layout", spec.layout), ("dst_layout", spec.dst_layout)):
        if layout not in PLAIN or layout != spec.layout:
            raise unsupported("", name, "NCHW or NHWC, the same of input and output, for MIOpenDriver", layout)
    if any(begin != end for begin, end in said.padding):
        raise unsupported("", "padding", "the same at the beginning and end for MIOpenDriver", spec.padding)
    if any(extra >= stride for extra, stride in zip(said.output_padding, spec.stride, strict=True) if extra):
        raise unsupported("", "output_padding", "less than the stride for MIOpenDriver", said.output_padding)
    axes = "dhw"[3 - spec.rank :]
    sizes = {"in": spec.in_spatial, "fil": spec.kernel, "pad": [begin for begin, _ in said.padding]}
    sizes |= {"conv_stride": spec.stride, "dilation": spec.dilation}
    if spec.transposed:
        sizes["trans_output_pad"] = said.output_padding
    values: dict[str, object] = {"batchsize": spec.n, "in_channels": spec.ic, "out_channels": spec.oc}
    values |= {f"{what}_{axis}": size for what, row in sizes.items() for axis, size in zip(axes, row, strict=True)}
    if spec.layout == "nhwc":
        layout = "NHWC" if spec.rank == 2 else "NDHWC"
        values |= {"in_layout": layout, "fil_layout": layout, "out_layout": layout}
    values |= {"spatial_dim": 3} if spec.rank == 3 else {}
    values |= {"mode": "trans" if spec.transposed else "conv", "group_count": spec.groups, "bias": int(spec.bias)}
    forward = 1 << DIRECTIONS.index(spec.direction)
    words = [f"{_flag(flag)} {value}" for flag, value in (values | {"forw": forward}).items()]
    command = next(command for command, dtype in _DTYPES.items() if dtype == spec.dtype)
    line = f"./bin/MIOpenDriver {command} {' '.join(words)}"
    check_said(said, parse(line), "MIOpenDriver")
    return line


def _flag(name: str) -> str:
    """A flag as MIOpen logs it: short where the short name is a letter."""
    short = _FLAGS[name][0] if name in _FLAGS else _IGNORED[name]
    return f"-{short}" if short.isalpha() and not name.endswith("layout") else f"--{name}"
