"""oneDNN's benchdnn: problems of its ``--conv`` and ``--deconv`` drivers, and batch files of them.

A problem is one word, ``mb1_ic64oc64_ih56oh56kh3sh1dh0ph1_n"name"``, with sizes for the axes depth,
height and width; ``dh`` is what lies between two taps, 0 if dense. What is left out is inferred as
benchdnn does: a batch of 2, stride 1, the output's size from the padding, or the padding at the
beginning from the output's size; and all of width from height, or of both from depth, where they have
nothing. What the output's size asks for beyond that is padding at the end. A name may be several,
joined by ``&``, and ``*4`` at the end of one says how often the layer occurs, as in oneDNN's inputs.

Options count for the problems after them, until they are given again. One that lists several values,
as ``--dt=f32,bf16``, gives a problem for each. How weights are laid out, and how benchdnn runs and
measures, is no part of a layer; bias and prelu's slope have its dtype, though oneDNN may keep f32. A layer of
integers has scales and zero points as tensors, whatever their values, and a bias in steps of its sums, to which
oneDNN's, added after the scales, is rounded.

What benchdnn prints is read as well: the problems that ``__REPRO:`` repeats, and lines that begin with ``perf,``.

Sources: ``tests/benchdnn/doc`` in oneDNN (``knobs_desc``, ``driver_conv``, ``knobs_attr``) and, where
that is silent, ``conv/conv_aux.cpp``, ``deconv/deconv_aux.cpp``, ``common.cpp``, ``utils/parser.cpp``.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from ..errors import SpecError, UnsupportedError
from ..problem.activation import Activation
from ..problem.layout import BLOCKS
from ..problem.spec import ConvSpec
from .notation import check_said, plain, unsupported

#: Options, problems and batch files of one source, those of its batch files included.
LIMIT = 1_000_000
#: How deep batch files may be nested.
DEPTH = 50

_FIELD = re.compile(r"(g|mb|[io]c|[iokspd][dhw])([0-9]{1,18})_?")
_LINE = re.compile(
    r"\s*(?:.*__REPRO:\s*|(?:\S*/)?benchdnn\s+)?"  # benchdnn's reports, and the command itself
    rf"((?:--[a-z]|-v[0-9]|(?:{_FIELD.pattern}){{2}}).*)",
    re.DOTALL,
)

#: Types of layers that have one for all tensors.
_DTYPES = ("f32", "f16", "bf16")
#: Types of integer layers' tensors, as specs have them.
_INTEGERS = {"src": {"s8": "i8", "u8": "u8"}, "weights": {"s8": "i8", "u8": "u8"}}
_INTEGERS["dst"] = {**_INTEGERS["src"], "s32": "i32", "f32": "f32"}
_DRIVERS = ("--conv", "--deconv")
#: Values of --dir -> directions; those that end in B have a bias.
_DIRECTIONS = {
    "FWD_B": "forward",
    "FWD_D": "forward",
    "FWD_I": "forward",
    "BWD_D": "data",
    "BWD_W": "weights",
    "BWD_WB": "weights",
}
#: Options that describe a problem, and their default values.
_MADE_OF = {"dir": "FWD_B", "dt": "f32", "bia-dt": "undef", "stag": "any", "dtag": "any", "mb": "0"}
#: Options that change what is computed or which problems are run, with the values that change nothing.
_NEUTRAL = {
    "attr-dropout": ("", "0"),
    "attr-rounding-mode": ("",),
    "attr-scales": ("",),
    "attr-zero-points": ("",),
    "match": ("", ".*"),
    "start": ("", "0"),
    "strides": ("", "::"),
}
#: Of these, what layers of integers have as tensors; and for which elements one value of these may count: words of
#: benchdnn, and masks of oneDNN's axes (3: of groups and channels). ``out`` is the product of all scales.
_QUANTISED = ("attr-scales", "attr-zero-points")
_POLICIES = {
    "src": ("common", "per_tensor", "0"),
    "dst": ("common", "per_tensor", "0"),
    "weights": ("common", "per_tensor", "per_oc", "0", "1", "3"),
    "out": ("common", "per_tensor", "per_oc", "0", "2"),
}
_DEFAULTS = _MADE_OF | {"attr-post-ops": ""} | dict.fromkeys(_NEUTRAL, "")
#: Options about how problems are run, and how exact that may be.
_IGNORED = re.compile(
    r"-v[0-9]+|--(alg|allow-enum-tags-only|attr-acc-mode|attr-deterministic|attr-fpmath|attr-same-pd-check|"
    r"attr-scratchpad|canonical|check-ref-impl|cold-cache|cpu-isa-hints|ctx-exe|ctx-init|engine|execution-mode|"
    r"fast-ref|fix-times-per-prb|global-impl|global-skip-impl|impl|max-ms-per-prb|mem-check|memory-kind|mode|"
    r"mode-modifier|num-streams|perf-template|repeats-per-prb|skip-impl|stream-kind|summary|verbose|wtag)=.*"
)
#: Values of the deprecated option --cfg -> those of --dt.
_CONFIGURATIONS = {"f32_wino": "f32", "bf16bf16bf16": "bf16"}

#: A layer, how often it occurs and its names; or the error that says why a problem cannot be one.
Outcome = tuple[ConvSpec, int, tuple[str, ...]] | SpecError | UnsupportedError


def recognise(line: str) -> bool:
    """Whether a line is meant for benchdnn, or is what it says of a convolution."""
    measured = _measured(line)
    return any(word in _DRIVERS for word in measured.split()) if measured else _LINE.match(line) is not None


def _measured(line: str) -> str:
    """The problem in a line of results, ``perf,cpu,jit:avx2,"name",--conv …,0.5,78.3``; empty where it is none."""
    line = line.strip()
    begin = line.find(",--") + 1 if line.startswith("perf,") else 0
    end = len(line) if begin else 0
    while (comma := line.rfind(",", begin, end)) >= 0 and not re.search(r'["\s]', line[comma:end]):
        end = comma  # what stands behind the problem: numbers
    return line[begin:end]


def layer(word: str, options: Mapping[str, str], *, transposed: bool, where: str) -> ConvSpec:
    """The layer of a problem with single values of options, such as ``{"dt": "bf16", "dir": "FWD_I"}``.

    Raises:
        SpecError: a field is missing, or does not fit the others.
        UnsupportedError: it is no layer that a spec can say.
    """
    spec, _ = _problem(word, transposed, where)
    return _with_options(spec, _DEFAULTS | dict(options), where)


class Reader:
    """Reads line after line as benchdnn reads a command line or a batch file.

    Args:
        lines: gives the lines of a batch file, each after its place for messages.
        path: the file that is read, which its batch files are sought beside; None: the working folder.
    """

    def __init__(self, lines: Callable[[Path], Iterable[tuple[str, str]]], path: Path | None = None) -> None:
        self._lines = lines
        self._files = [path] if path else []
        self._left = LIMIT
        self._begin("--conv")

    def _begin(self, driver: str) -> None:
        self._driver = driver
        self._options = {name: [value] for name, value in _DEFAULTS.items()}

    def read(self, line: str, where: str) -> Iterator[Outcome]:
        """The problems of a line with counts and names; for a problem that cannot be a layer of ours, the error.

        Raises:
            SpecError: an option is unknown, or a batch file cannot be read; names it.
        """
        match = _LINE.match(line)
        words = " ".join((_measured(line) or (match[1] if match else line)).split()) + " "
        # benchdnn joins a word that ends in a backslash, or has one behind it, to the next.
        for word in words.replace(" \\ ", "").replace("\\ ", "").split():
            self._count(where)
            if word.startswith("--batch="):
                yield from self._batch(word.partition("=")[2], where)
            elif word.startswith("-"):
                self._option(word, where)
            else:
                yield from self._problems(word, where)

    def _count(self, where: str) -> None:
        self._left -= 1
        if self._left < 0:
            raise SpecError("problems", f"at most {LIMIT} of them and their options", "more", where)

    def _option(self, word: str, where: str) -> None:
        name, equals, value = word.removeprefix("--").partition("=")
        value = value.strip("\"'")
        if word in _DRIVERS:  # a command line begins
            self._begin(word)
        elif word == "--reset":
            self._begin(self._driver)
        elif name == "cfg" and equals:
            self._options["dt"] = [_CONFIGURATIONS.get(item, item) for item in (value or "f32").split(",")]
        elif name in ("match", "start") and equals:
            self._options[name] = [value]
        elif name in _DEFAULTS and equals:
            self._options[name] = value.split(",") if value else [_DEFAULTS[name]]
        elif not _IGNORED.fullmatch(word):
            raise SpecError(word, "an option of benchdnn's conv and deconv drivers", "an unknown one", where)

    def _batch(self, name: str, where: str) -> Iterator[Outcome]:
        """The problems of another file: beside the one that names it, or beside that one's, and so on."""
        folders = [file.parent for file in reversed(self._files)] or [Path()]
        path = next((path for folder in folders if os.path.isfile(path := folder / name)), None)
        if path is None:
            raise SpecError("--batch", "an existing file", name[:80], where)
        if len(self._files) > DEPTH or any(path.samefile(file) for file in self._files):
            raise SpecError("--batch", f"a file that does not include itself, at most {DEPTH} deep", name, where)
        self._files.append(path)
        for place, line in self._lines(path):
            yield from self.read(line, place)
        self._files.pop()

    def _problems(self, word: str, where: str) -> Iterator[Outcome]:
        """The problem, once for every combination of the options' values."""
        try:
            spec, label = _problem(word, self._driver == "--deconv", where)
        except (SpecError, UnsupportedError) as error:
            yield error
            return
        count, names = _names(label)
        for values in itertools.product(*self._options.values()):
            self._count(where)
            try:
                yield _with_options(spec, dict(zip(self._options, values, strict=True)), where), count, names
            except (SpecError, UnsupportedError) as error:
                yield error


# ---- a problem's sizes ------------------------------------------------------------------------


def _problem(word: str, transposed: bool, where: str) -> tuple[ConvSpec, str]:
    """The layer of a problem without options, and its label."""
    given = dict.fromkeys((letter + axis for letter in "iokspd" for axis in "dhw"), 0)
    given |= {"g": 1, "mb": 2, "ic": 0, "oc": 0, "sd": 1, "sh": 1, "sw": 1, "pd": -1, "ph": -1, "pw": -1}
    rest = word
    while match := _FIELD.match(rest):
        given[match[1]] = int(match[2])
        rest = rest[match.end() :]
    if rest and not rest.startswith("n"):
        raise SpecError(rest[:40], 'a field such as ih56, or n"name"', "another word", where)

    def present(name: str) -> int:
        if not given[name]:
            raise SpecError(name, "a size of 1 or more", "0 or none", where)
        return given[name]

    axes: dict[str, _Axis] = {}
    for axis in "dhw":
        i, o, k, s, p, d = (given[letter + axis] for letter in "iokspd")
        if i or o or k or d or s != 1 or p > 0:
            sizes = present("i" + axis), o, present("k" + axis), present("s" + axis), p, d + 1
            axes[axis] = _axis(axis, sizes, transposed, where)
    rank = {"w": 1, "h": 2, "hw": 2, "d": 3, "dhw": 3}.get("".join(axes))
    if rank is None:
        raise SpecError("axes", "w, h and w, or d, h and w", " and ".join(axes) or "none", where)
    in_spatial, kernel, stride, dilation, padding, extra = zip(*([*axes.values()] * rank)[:rank], strict=True)
    fields = {
        "n": given["mb"],
        "ic": present("ic"),
        "oc": present("oc"),
        "groups": present("g"),
        "in_spatial": in_spatial,
        "kernel": kernel,
        "stride": stride,
        "dilation": dilation,
        "padding": padding,
        "output_padding": extra,
        "transposed": transposed,
    }
    return plain(ConvSpec.from_dict(fields, where)), rest[1:].replace("\\", "").strip("\"'")


def _label(name: str) -> str:
    """A name as a problem's label can have it."""
    return re.sub(r"[\s\"'\\&*]+", "_", "".join(c if c.isprintable() else " " for c in name))


def _names(label: str) -> tuple[int, tuple[str, ...]]:
    """Count and names of a problem's label, ``a*3&b``."""
    count, names = 0, []
    for part in label.split("&"):
        name, number = re.fullmatch(r"(.*?)(?:\*([0-9]{1,9}))?", part, re.DOTALL).groups()  # type: ignore[union-attr]
        count += max(int(number or 1), 1)
        names += [name] * bool(name)
    return count, tuple(names)


_Axis = tuple[int, int, int, int, tuple[int, int], int]


def _axis(axis: str, sizes: tuple[int, ...], transposed: bool, where: str) -> _Axis:
    """Input, kernel, stride, dilation, padding and output padding of an axis.

    ``sizes`` are input, output (0: none given), kernel, stride, padding (-1: none given) and dilation.
    """
    i, o, k, stride, pad, dilation = sizes
    window = (k - 1) * dilation + 1
    if not o:
        pad = max(pad, 0)
        o = (i - 1) * stride + window - 2 * pad if transposed else _quotient(i - window + 2 * pad, stride) + 1
        if o < 1:
            raise SpecError("o" + axis, "1 or more with these sizes", o, where)
    total = (i - 1) * stride + window - o if transposed else (o - 1) * stride + window - i
    if pad < 0:
        pad = _quotient(total, 2)
        if pad < 0:
            raise unsupported(where, "o" + axis, "an output that needs no negative padding", o)
    end = total - pad
    if -end >= (max(stride, dilation) if transposed else stride):
        raise unsupported(where, "o" + axis, "the size that this input gives with padding", o)
    return i, k, stride, dilation, (pad, max(end, 0)), max(-end, 0) * transposed


def _quotient(a: int, b: int) -> int:
    """``a / b`` as in C: towards zero."""
    return a // b if a >= 0 else -(-a // b)


# ---- what options add to it -------------------------------------------------------------------


def _with_options(spec: ConvSpec, options: dict[str, str], where: str) -> ConvSpec:
    types = _types(options["dt"], where)
    is_quantised = types["dtype"] == "i8"
    for name, values in _NEUTRAL.items():
        if options[name] not in values and not (is_quantised and name in _QUANTISED):
            raise unsupported(where, f"--{name}", "none", options[name])
    word, bias = options["dir"].upper(), options["bia-dt"]
    if word not in _DIRECTIONS:
        raise unsupported(where, "--dir", f"one of {', '.join(_DIRECTIONS)}", options["dir"])
    own = "s32" if is_quantised else types["dtype"]
    if bias not in ("undef", "f32", own):
        raise unsupported(where, "--bia-dt", f"undef, f32 or {own}", bias)
    tagged = [_layout(name, options[name], spec.rank, where) for name in ("stag", "dtag")]
    known = [layout for layout in tagged if layout != "any"] or ["nchw"]
    src_layout, dst_layout = known[0], known[-1]  # oneDNN may choose any; it is the other's then
    if not re.fullmatch("[0-9]{1,18}", options["mb"]):
        raise SpecError("--mb", "a number", options["mb"], where)
    ops = options["attr-post-ops"]
    residual, activation = _epilogue(ops, types["dtype"], dst_layout, spec.rank, where)
    if is_quantised and (residual or activation not in ("none", "relu")):
        raise unsupported(where, "--attr-post-ops", "none or relu, for a layer of integers", ops)
    changes = {
        "n": int(options["mb"]) or spec.n,
        "layout": src_layout,
        "dst_layout": dst_layout,
        "bias": word.endswith("B") or (bias != "undef" and not word.startswith("BWD")),
        "direction": _DIRECTIONS[word],
        "residual": residual,
        "activation": activation,
    }
    zeros = _zero_points(types, options, where) if is_quantised else {}
    return ConvSpec.from_dict(spec.to_dict() | types | changes | zeros, where)


def _types(text: str, where: str) -> dict[str, str]:
    """The fields of types that ``--dt`` says: one for all, or those of src, weights and dst."""
    names = text.split(":") * (1 if ":" in text else 3)
    if len(names) == 3 and names[0] in _DTYPES and len(set(names)) == 1:
        return {"dtype": names[0]}
    found = [known.get(name) for known, name in zip(_INTEGERS.values(), names, strict=False)]
    if len(names) == 3 and None not in found:
        return {"dtype": "i8"} | {f"{tensor}_dtype": str(dtype) for tensor, dtype in zip(_INTEGERS, found, strict=True)}
    expected = f"one of {', '.join(_DTYPES)} for all tensors, or s8 or u8 for src and weights"
    raise unsupported(where, "--dt", expected, text)


def _zero_points(types: dict[str, str], options: dict[str, str], where: str) -> dict[str, bool]:
    """Which tensors of a layer of integers have a zero point; refuses scales and zero points that specs do not have."""
    if types["dst_dtype"] == "i32" and (options["attr-scales"] or options["attr-post-ops"]):
        raise unsupported(where, "--attr-scales, --attr-post-ops", "none with a dst of s32", "some")
    zeros = {}
    for option in _QUANTISED:
        for argument in filter(None, options[option].split("+")):
            name, policy, *values = [*argument.split(":"), ""]
            tensor = {"wei": "weights"}.get(name, name.removesuffix("0"))
            if policy not in _POLICIES.get(tensor, ()) or (option.endswith("points") and tensor == "out"):
                raise unsupported(where, f"--{option}", "one for src and dst each, or one for all or each oc", argument)
            if option == "attr-zero-points" and not re.fullmatch("0+", values[0]):
                zeros[f"{tensor}_zero"] = True
    return zeros


def _tags(layout: str, rank: int) -> tuple[str, ...]:
    """A layout's names: of oneDNN's dimensions in order, of any rank, and by letter."""
    letters, sizes = "cde"[:rank], "dhw"[3 - rank :]
    if layout == "nchw":
        return "abx", f"ab{letters}", f"nc{sizes}"
    if layout == "nhwc":
        return "axb", f"a{letters}b", f"n{sizes}c"
    return f"aBx{BLOCKS[layout]}b", f"aB{letters}{BLOCKS[layout]}b", f"nC{sizes}{BLOCKS[layout]}c"


def _layout(option: str, tag: str, rank: int, where: str) -> str:
    if tag == "any":
        return "any"
    for layout in BLOCKS:
        if tag in _tags(layout, rank):
            return layout
    known = ", ".join(("any", *(tag for layout in BLOCKS for tag in _tags(layout, rank))))
    raise unsupported(where, f"--{option}", f"one of {known}", tag)


# ---- post-ops ---------------------------------------------------------------------------------

#: Forward formulas of oneDNN's eltwise primitive: kind -> an activation by alpha and beta, or None.
_ELTWISE: dict[str, Callable[[float, float], Activation | None]] = {
    "clip": lambda alpha, beta: Activation("clip", (alpha, beta)),
    "clip_v2": lambda alpha, beta: Activation("clip", (alpha, beta)),  # differs in the gradient only
    "elu": lambda alpha, beta: Activation("elu", (alpha,)),
    "gelu_erf": lambda alpha, beta: Activation("gelu"),
    "gelu_tanh": lambda alpha, beta: Activation("gelu_tanh"),
    "hardsigmoid": lambda alpha, beta: Activation("hardsigmoid", (alpha, beta)),
    # 1/6 in the six digits that oneDNN prints, or more of them.
    "hardswish": lambda alpha, beta: Activation("hardswish") if (f"{alpha:.6g}", beta) == ("0.166667", 0.5) else None,
    "linear": lambda alpha, beta: Activation("none") if (alpha, beta) == (1, 0) else None,
    "logistic": lambda alpha, beta: Activation("sigmoid"),
    "mish": lambda alpha, beta: Activation("mish"),
    "relu": lambda alpha, beta: Activation("leaky_relu", (alpha,)) if alpha else Activation("relu"),
    "swish": lambda alpha, beta: Activation("silu") if alpha == 1 else None,
    "tanh": lambda alpha, beta: Activation("tanh"),
}
#: The post-op of an activation, with its parameters.
_POST_OPS = {
    "clip": "clip:{}:{}",
    "elu": "elu:{}",
    "gelu": "gelu_erf",
    "gelu_tanh": "gelu_tanh",
    "hardsigmoid": "hardsigmoid:{}:{}",
    "hardswish": f"hardswish:{1 / 6}:0.5",
    "leaky_relu": "relu:{}",
    "mish": "mish",
    "prelu": "prelu:per_oc",
    "relu": "relu",
    "sigmoid": "logistic",
    "silu": "swish:1",
    "tanh": "tanh",
}


def _epilogue(text: str, dtype: str, layout: str, rank: int, where: str) -> tuple[bool, str]:
    """Residual and activation of a chain of post-ops: at most one of each, in this order."""
    ops = text.split("+") if text else []
    residual = bool(ops) and _is_residual(ops[0], dtype, layout, rank)
    found = [_activation(op) for op in ops[residual:]]
    if len(found) > 1 or None in found:
        expected = f"sum or add:{dtype}:per_tensor, then an activation convgen has"
        raise unsupported(where, "--attr-post-ops", expected, text)
    return residual, str(found[0]) if found else "none"


def _is_residual(op: str, dtype: str, layout: str, rank: int) -> bool:
    name, *texts = op.split(":")
    if name == "sum":
        scale, zero_point, stored, *more = [*texts, *("1", "0", dtype)[len(texts) :]]
        return (_float(scale), _float(zero_point), stored, more) == (1, 0, dtype, [])
    if name not in ("add", "binary_add") or len(texts) not in (2, 3) or texts[0] != dtype:
        return False
    whole = 2 ** (rank + 2) - 1
    everywhere = texts[1] == "per_tensor" or (texts[1].isdecimal() and int(texts[1][:9]) & whole == whole)
    return everywhere and (len(texts) == 2 or texts[2] in ("any", *_tags(layout, rank)))


def _activation(op: str) -> Activation | None:
    if re.fullmatch("prelu:(per_oc|per_dim_1|2)(:f32)?", op):
        return Activation("prelu")
    name, *texts = op.removeprefix("eltwise_").split(":")
    make = _ELTWISE.get(name.removesuffix("_use_dst_for_bwd").removesuffix("_dst"))
    if name == "hardswish" and not texts:  # of oneDNN 2, where it had no parameters; with zeros it would be 0
        return Activation("hardswish")
    numbers = [_float(text) for text in texts]
    if make is None or len(numbers) > 3 or None in numbers or numbers[2:] not in ([], [1.0]):
        return None
    alpha, beta = [number for number in numbers[:2] if number is not None] + [0.0] * (2 - len(numbers))
    return make(alpha, beta)


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


# ---- writing ----------------------------------------------------------------------------------


def _said_types(spec: ConvSpec) -> str:
    """The types of src, weights and dst, or the one of all tensors, as ``--dt`` says them."""
    if not spec.is_quantised:
        return spec.dtype
    own = {tensor: getattr(spec, f"{tensor}_dtype") for tensor in _INTEGERS}
    return ":".join(
        name for tensor, known in _INTEGERS.items() for name, dtype in known.items() if dtype == own[tensor]
    )


def _said_quantisation(spec: ConvSpec) -> list[str]:
    """Options of a layer of integers: a scale for each channel, and zero points, whose values are examples."""
    scales = [] if spec.dst_dtype == "i32" else ["--attr-scales=wei:per_oc"]
    said = {"src": "src:common:1", "weights": "wei:per_oc:1", "dst": "dst:common:2"}
    zeros = "+".join(text for tensor, text in said.items() if getattr(spec, f"{tensor}_zero"))
    return scales + [f"--attr-zero-points={zeros}"] * bool(zeros)


def write(spec: ConvSpec, count: int = 1, names: Sequence[str] = ()) -> str:
    """The command line of a problem, which :class:`Reader` reads as :func:`plain` of the spec.

    What would not be taken within a name is an underscore there; of more names than ``count``, the
    first ones are kept.

    Raises:
        UnsupportedError: benchdnn cannot say a field; names it.
    """
    stag, dtag = (_tags(layout, spec.rank)[0] for layout in (spec.layout, spec.dst_layout))
    direction = {"forward": "FWD_I", "data": "BWD_D", "weights": "BWD_WB" if spec.bias else "BWD_W"}[spec.direction]
    words = ["--deconv" if spec.transposed else "--conv", f"--dir={direction}"]
    bias = "s32" if spec.is_quantised else spec.dtype
    words += [f"--bia-dt={bias}"] * (spec.bias and spec.direction == "forward")
    words += [f"--dt={_said_types(spec)}", f"--stag={stag}", f"--dtag={dtag}"]
    if spec.is_quantised:
        words += _said_quantisation(spec)
    activation = spec.activation_op
    ops = ["sum"] * spec.residual
    if activation.name in _POST_OPS:
        ops.append(_POST_OPS[activation.name].format(*activation.params))
    if ops:
        words.append(f"--attr-post-ops={'+'.join(ops)}")
    problem = [f"mb{spec.n}", f"g{spec.groups}ic{spec.ic}oc{spec.oc}"]
    sizes = zip(spec.in_spatial, spec.out_spatial, spec.kernel, spec.stride, spec.dilation, spec.padding, strict=True)
    for axis, (i, o, k, stride, dilation, (begin, _)) in zip("dhw"[3 - spec.rank :], sizes, strict=True):
        problem.append(f"i{axis}{i}o{axis}{o}k{axis}{k}s{axis}{stride}d{axis}{dilation - 1}p{axis}{begin}")
    first, *others = map(_label, names[:count] or [""])
    times = count - len(others)
    if label := "&".join([first + f"*{times}" * (times > 1), *others]):
        problem.append(f'n"{label}"')
    line = " ".join([*words, "_".join(problem)])
    (said,) = Reader(lambda path: ()).read(line, "")
    if not isinstance(said, tuple):
        raise said
    check_said(plain(spec), said[0], "benchdnn")
    return line
