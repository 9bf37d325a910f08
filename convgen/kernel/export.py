"""Writes a kernel as a library: shared and static, with a C header, a manifest, and an example that checks it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ExportError
from ..folders import TemporaryFolder
from ..lowering.entry import PART_ALIGNMENT, workspace_layout
from ..lowering.interface import (
    ABI,
    ALIGNMENT,
    HEADER_BYTES,
    DeviceCode,
    Interface,
    TensorInfo,
    read_architecture,
    round_up,
)
from ..lowering.link import link
from ..lowering.runtime import source
from ..lowering.stack import STACK
from ..lowering.toolchain import architecture
from ..problem.activation import Activation
from ..problem.dtypes import BYTES, UNDERFLOW, UNIT_ROUNDOFF
from ..problem.layout import Blocks
from ..problem.spec import PARAMETERS, ConvSpec
from . import example_integers
from .destination import check_destination, move
from .load import MANIFEST
from .names import check_export_name
from .packages import Package, package_files
from .templates import (
    byte_constants,
    element_constants,
    example_driver,
    example_helpers,
    filled,
    header_parts,
    needed_cpu,
    workspace_constant,
)

#: Alignment in bytes of tensors in a GPU's memory (``cuda_types.h``).
TENSOR_ALIGNMENT = 16
#: Multiply-accumulates the example spends on plain loops: about a second without optimisation.
EXAMPLE_MACS = 30_000_000


def write_library(
    directory: str | os.PathLike[str],
    interface: Interface,
    object_file: Path,
    facts: Mapping[str, Any],
    libc: str | None = None,
) -> dict[str, Any]:
    """Write ``lib<name>.so``, ``lib<name>.a``, ``<name>.h``, ``example.c``, a CMake package, a pkg-config file and
    ``manifest.json``.

    All of it or nothing: the files are made beside ``directory`` and moved there when they are done.
    An earlier export of the same name is replaced.

    Args:
        directory: created where it does not exist; it holds one library.
        interface: the kernel.
        object_file: its compiled code.
        facts: what else the manifest says, as JSON values: ``threads`` (the number it was tuned for, on which
            :func:`convgen.load` runs it), and where known ``target``, ``schedule``, ``picks``,
            ``seconds``, ``versions`` and others. ``error_factor`` is the admitted error in
            units of 2^-24 * (conv(|src|, |weights|) + |bias| + |residual|), before the activation.
        libc: the C library that it is for, ``musl`` or ``glibc-2.28``, say; the compiler's own where None.

    Returns:
        The manifest.

    Raises:
        ExportError: the directory holds something else, or cannot be written; the kernel's name is taken.
        BuildError: linking failed.
    """
    names = check_folder(directory, interface.name, interface.spec)
    if "threads" not in facts:
        raise ExportError(f"facts: expected threads among them, found {', '.join(facts) or 'none'}")
    target = Path(os.path.abspath(directory))
    try:
        existing = next(parent for parent in target.parents if parent.exists())
        with TemporaryFolder(existing) as temporary:
            folder = temporary / target.name
            folder.mkdir()  # with the usual permissions
            manifest = _write_files(folder, interface, object_file, facts, libc)
            move(folder, target, interface.name, names)
    except OSError as error:
        raise ExportError(f"{target}: cannot write the library {interface.name}: {error}") from error
    return manifest


def check_folder(directory: str | os.PathLike[str], name: str, spec: ConvSpec) -> list[str]:
    """Whether a layer's kernel of that name may be exported to a folder, before the minutes that making it may take.

    Returns:
        The files that are written.

    Raises:
        ExportError: something else is there, or cannot be looked at; the kernel's name is taken.
    """
    if name != spec.name:  # which has the layer's sizes in it: nothing else is called so
        check_export_name(name)
    names = [*_file_names(name), MANIFEST]
    try:
        check_destination(Path(os.path.abspath(directory)), name, names)
    except OSError as error:
        raise ExportError(f"{directory}: {error.strerror}") from error
    return names


def _file_names(name: str) -> tuple[str, ...]:
    """The names of a library's files but for the manifest."""
    return f"lib{name}.so", f"lib{name}.a", f"{name}.h", "example.c", *package_files(name)


def _write_files(
    folder: Path, interface: Interface, object_file: Path, facts: Mapping[str, Any], libc: str | None
) -> dict[str, Any]:
    name, device = interface.name, interface.device
    shared, archive, header, example, *_ = files = [folder / file for file in _file_names(name)]
    link(interface, object_file, shared, libc=libc)
    link(interface, object_file, archive, archive=True, libc=libc)
    header.write_text(header_text(interface), encoding="utf-8")
    example.write_text(example_text(interface, facts.get("error_factor")), encoding="utf-8")
    libraries = ("m", "pthread") if device is None else ("m", "pthread", "dl")
    arch = architecture(object_file.read_bytes())
    package = Package(name, f"{ABI}.0", interface.spec.descriptor, arch, libraries)
    package.write(folder, libc)
    manifest = {**_manifest(interface, facts), "needs": package.needs(shared, libc)}
    write_manifest(folder, manifest, files)
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any], files: Sequence[Path]) -> None:
    """Write a manifest with the files' digests, which are added to it.

    Raises:
        ExportError: it has what JSON cannot say.
    """
    manifest["files"] = {
        path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
        for path in files
    }
    try:
        text = json.dumps(manifest, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ExportError(f"facts: expected JSON values, found {error}") from error
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


# ---- manifest ----------------------------------------------------------------------------------


def _axes(spec: ConvSpec) -> dict[str, list[str]]:
    """The names of every tensor's axes, outermost first."""
    letters = "dhw"[3 - spec.rank :]

    inputs, outputs = (spec.src_blocks, "i"), (spec.dst_blocks, "o")

    def activations(blocks: Blocks, prefix: str) -> list[str]:
        return blocks.axes(f"{prefix}c", [prefix + letter for letter in letters])

    channels = ["ic", "oc/groups"] if spec.transposed else ["oc", "ic/groups"]
    weights = [*channels, *(f"k{letter}" for letter in letters)]
    dst = activations(*outputs)
    if spec.direction == "weights":  # with the gradient of bias, one flat tensor
        dst = [f"{' * '.join(weights)} + oc"] if spec.bias else weights
    return {
        "src": activations(*inputs),
        "weights": weights,
        "bias": ["oc"],
        "slope": ["oc"],
        "scale": ["oc"],
        "src_zero": ["1"],
        "weights_zero": ["oc"],
        "dst_zero": ["1"],
        "sum": ["4"],
        "residual": activations(*outputs),
        "dst": dst,
    }


def _manifest(interface: Interface, facts: Mapping[str, Any]) -> dict[str, Any]:
    spec, axes = interface.spec, _axes(interface.spec)
    rest = {name: fact for name, fact in facts.items() if name != "error_factor"}
    own = {
        "abi": ABI,
        "name": interface.name,
        "spec": {"descriptor": spec.descriptor, "key": spec.key, "fields": spec.to_dict()},
        "arguments": [
            {
                "name": name,
                "function": "pack" if name in PARAMETERS else "run",
                "shape": list(tensor.shape),
                "axes": axes[name],
                "layout": "dense, row-major",
                "dtype": tensor.dtype,
                "bytes": tensor.bytes,
                "alignment": _alignment(interface, name, tensor),
            }
            for name, tensor in interface.arguments.items()
        ],
        "packed": {
            "bytes": interface.packed_size,
            "alignment": ALIGNMENT,
            "header_bytes": HEADER_BYTES,
            "tensors": [
                {"name": t.name, "shape": list(t.shape), "dtype": t.dtype, "bytes": t.bytes, "offset": offset}
                for t, offset in zip(interface.packed, interface.packed_offsets, strict=True)
            ],
        },
        "workspace": _workspace(interface, facts["threads"]),
        **({} if interface.device is None else {"device": _device(interface.device)}),
        "isa": list(interface.isa),
        "error_bound": {
            "factor": facts.get("error_factor"),
            "unit": "2^-24 * (conv(|src|, |weights|) + |bias| + |residual|), before the activation",
        },
    }
    if clash := sorted({*own, "needs", "files"} & rest.keys()):
        raise ExportError(f"facts: expected none that the manifest has of its own, found {', '.join(clash)}")
    return own | rest


def _alignment(interface: Interface, name: str, tensor: TensorInfo) -> int:
    """Bytes that an argument's address is a multiple of: in a GPU's memory a fixed number, else its element's size."""
    on_device = interface.device is not None and name in ("src", "residual", "dst")
    return TENSOR_ALIGNMENT if on_device else BYTES[tensor.dtype]


def _workspace(interface: Interface, threads: int) -> dict[str, Any]:
    if interface.device is not None:
        return {"bytes": workspace_layout(interface.device)[1], "alignment": ALIGNMENT}
    return {
        "formula": "fixed + threads * per_thread",
        "fixed": round_up(interface.workspace_main),
        "per_thread": round_up(interface.workspace_task),
        "bytes": interface.workspace_size(threads),
        "alignment": ALIGNMENT,
    }


def _device(device: DeviceCode) -> dict[str, Any]:
    """What runs on a GPU, one launch after the other."""
    offsets, size = workspace_layout(device)
    return {
        "architectures": [what for what, _ in device.images],
        "launches": [
            {
                "function": launch.function,
                "grid": list(launch.grid),
                "block": list(launch.block),
                "dynamic_shared_memory": launch.shared,
                "arguments": list(launch.arguments),
                "tensor_maps": {name: dataclasses.asdict(made) for name, made in launch.maps.items()},
            }
            for launch in device.launches
        ],
        "workspace": {
            "bytes": size,
            "part_alignment": PART_ALIGNMENT,
            "parts": [
                {"name": f"workspace{i}", "bytes": part, "offset": offset}
                for i, (part, offset) in enumerate(zip(device.workspace, offsets, strict=True))
            ],
        },
    }


# ---- header and example ------------------------------------------------------------------------


def header_text(interface: Interface) -> str:
    """``<name>.h``: includes nothing but ``stddef.h``; C11 and C++."""
    axes = _axes(interface.spec)
    lines = []
    for name, tensor in interface.arguments.items():
        sizes = ", ".join(map(str, tensor.shape))
        lines.append(f" *   {name + ' ':9}[{', '.join(axes[name])}] = [{sizes}], {tensor.dtype}, {tensor.bytes} bytes")
    if interface.spec.is_quantised:
        lines.append(" *   (i8 is int8_t, u8 uint8_t, i32 int32_t, f32 float)")
    lines.append(f" *   packed    {interface.packed_size} bytes, aligned to {ALIGNMENT}")
    common = {
        "name": interface.name,
        "descriptor": interface.spec.descriptor,
        "meaning": _meaning(interface.spec),
        **header_parts(interface.name),
        "stack": STACK >> 10,
    }
    constants = byte_constants(interface.name, {name: tensor.bytes for name, tensor in interface.arguments.items()})
    constants += element_constants(
        interface.name, {name: math.prod(tensor.shape) for name, tensor in interface.arguments.items()}
    )
    constants += byte_constants(interface.name, {"packed": interface.packed_size})
    if interface.device is not None:
        lines.append(f" *   workspace {workspace_layout(interface.device)[1]} bytes, aligned to {ALIGNMENT}")
        lines.append(f" * src, residual and dst are aligned to {TENSOR_ALIGNMENT}.")
        constants += byte_constants(interface.name, {"workspace": workspace_layout(interface.device)[1]})
        own = {"devices": devices_text(interface.device), "cuda_types": source("cuda_types.h").strip()}
        described = {"tensors": "\n".join(lines), "constants": "\n".join(constants)}
        return filled("header_cuda.template.h", **common, **described, **own)
    fixed, share = round_up(interface.workspace_main), round_up(interface.workspace_task)
    lines.append(f" *   workspace {fixed} + threads * {share} bytes, aligned to {ALIGNMENT}")
    constants.append(workspace_constant(interface.name, fixed, share))
    described = {"tensors": "\n".join(lines), "constants": "\n".join(constants), "isa": needed_cpu(interface.isa)}
    return filled("header.template.h", **common, **described)


def devices_text(device: DeviceCode) -> str:
    """The GPUs that the images are for, in words."""
    words = []
    for what, _ in device.images:
        arch = read_architecture(what)
        number = f"{arch.major}.{arch.minor}"
        if arch.exact:
            words.append(f"compute capability {number} exactly")
        elif not arch.virtual:
            words.append(f"{number} to {arch.major}.9")
        else:
            words.append(f"{number} and later (compiled when it is loaded)")
    return "; ".join(words)


def _meaning(spec: ConvSpec) -> str:
    operation = "conv_transpose" if spec.transposed else "conv"
    if spec.direction != "forward":
        given = "src, weights" if spec.direction == "data" else "src, residual"
        return f"dst = gradient of {operation}'s {spec.direction.replace('data', 'input')}({given})"
    terms = [f"{operation}(src, weights)"] + ["bias"] * spec.bias + ["residual"] * spec.residual
    total = " + ".join(terms)
    if spec.is_quantised:
        return example_integers.meaning(spec, operation)
    return f"dst = {total}" if spec.activation == "none" else f"dst = {spec.activation_op.name}({total})"


def example_text(interface: Interface, error_factor: float | None = None) -> str:
    """``example.c``: calls the library on whole numbers and compares with plain loops.

    ``error_factor`` is as :func:`write_library` has it; where None, plain summation's is taken.
    """
    spec = interface.spec
    extra = [name for name in spec.shapes if name not in ("src", "weights", "dst")]
    values = {"bias": "-4, 4", "slope": "-1, 1", "residual": "-4, 4"}
    made = {name: f"    {name} = tensor(sizes.{name}, {low_high});\n" for name, low_high in values.items()}
    operands, numbers = [name for name in spec.shapes if name != "dst"], ("-4, 4", "-2, 2")
    if spec.is_quantised:
        operands, numbers, made = ["src"], example_integers.values(spec), example_integers.parameters()

    def fields(*names: str) -> str:
        return "".join(f"        .{x} = {x},\n        .{x}_size = sizes->{x},\n" for x in names if x in spec.shapes)

    epilogue = ""
    if "bias" in spec.shapes:
        value = "value(bias[oc])"
        epilogue += f"    sum += {value};\n    absolute += fabs({value});\n"
    if spec.residual and spec.is_quantised:
        epilogue += "    added = residual[offset(n, OC, OC_BLOCK, oc, out_size, out)];\n"
    elif spec.residual:
        value = "value(residual[offset(n, OC, OC_BLOCK, oc, out_size, out)])"
        epilogue += f"    sum += {value};\n    absolute += fabs({value});\n"
    calls = {"name": interface.name, "pack": fields(*PARAMETERS), "run": fields("residual")}
    if interface.device is None:
        compute, libraries, sizes = filled("example_cpu.template.c", **calls), "-lm -lpthread", "2, &sizes"
    else:
        calls["run"] = calls["run"].replace("= residual,", "= upload(residual, sizes->residual),")
        compute = filled("example_cuda.template.c", **calls, driver=example_driver(interface.name))
        libraries, sizes = "-lm -lpthread -ldl", "&sizes"
    return filled(
        "example.template.c",
        name=interface.name,
        helpers=example_helpers(interface.name),
        libraries=libraries,
        compute=compute,
        sizes_arguments=sizes,
        sizes_note="; the workspace for up to two threads" if interface.device is None else "",
        descriptor=spec.descriptor,
        n=spec.n,
        ic=spec.src_blocks.channels,
        oc=spec.dst_blocks.channels,
        groups=spec.groups,
        in_size=_three(spec.src_spatial, 1),
        out_size=_three(spec.dst_spatial, 1),
        kernel=_three(spec.kernel, 1),
        stride=_three(spec.stride, 1),
        padding=_three(tuple(begin for begin, _ in spec.padding), 0),
        dilation=_three(spec.dilation, 1),
        step=_step(spec),
        element=_elements(spec),
        src_values=numbers[0],
        weights="" if spec.direction == "weights" else _weights_tensor(numbers[1]),
        loops=_loops(spec, epilogue),
        globals=", ".join(f"*{name}" for name in operands),
        ic_block=spec.src_blocks.size,
        oc_block=spec.dst_blocks.size,
        activation=example_integers.result(spec) if spec.is_quantised else _activation(spec.activation_op),
        tensors="".join(made[name] for name in extra),
        allowed=_allowed(spec, error_factor),
        free="".join(
            f"    free({name});\n" for name in reversed([*(["weights"] if "weights" in spec.shapes else []), *extra])
        ),
    )


#: How example.c spells the storage types; bfloat16, which C lacks, is the upper half of a float.
_ELEMENTS = {
    "f32": """\
typedef float element;

static double value(element x) { return x; }
static element stored(float x) { return x; }""",
    "f16": """\
__extension__ typedef _Float16 element; /* of compilers that have it, not of C11 */

static double value(element x) { return (double)x; }
static element stored(float x) { return (element)x; }""",
    "bf16": """\
typedef unsigned short element; /* bfloat16: the upper half of a float */

static double value(element x)
{
    const unsigned bits = (unsigned)x << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

static element stored(float x) /* a small whole number: nothing to round */
{
    unsigned bits;
    memcpy(&bits, &x, sizeof bits);
    return (element)(bits >> 16);
}""",
}


def _elements(spec: ConvSpec) -> str:
    """The types of tensors in C; of floats, all have one."""
    if spec.is_quantised:
        return example_integers.elements(spec)
    return f"{_ELEMENTS[spec.dtype]}\ntypedef element dst_element;"


_INDENT = " " * 24
_POSITION = f"{_INDENT}in[axis] = out[axis] * stride[axis] - padding[axis] + tap[axis] * dilation[axis];"
# The output is the sum of the windows that the inputs spread over it, so a tap has an input where the
# distance is a whole number of strides.
_TRANSPOSED_POSITION = f"""\
{_INDENT}const long spread = out[axis] + padding[axis] - tap[axis] * dilation[axis];
{_INDENT}in[axis] = spread / stride[axis];
{_INDENT}inside = inside && spread >= 0 && spread % stride[axis] == 0;"""


def _weights_tensor(low_high: str) -> str:
    return f"    weights = (void *)tensor(sizes.weights, {low_high});\n"


def _loops(spec: ConvSpec, epilogue: str) -> str:
    """The definition in C."""
    outputs = math.prod(spec.dst_shape)
    if spec.direction == "weights":
        near, far = ("in_size", "out_size") if spec.transposed else ("out_size", "in_size")
        return filled(
            "example_gradient.template.c",
            outputs=outputs,
            inner="OC_GROUP" if spec.transposed else "IC_GROUP",
            ic_of="outer" if spec.transposed else "outer / OC_GROUP * IC_GROUP + inner",
            oc_of="outer / IC_GROUP * OC_GROUP + inner" if spec.transposed else "outer",
            pixels=near,
            far_size=far,
            **{"in": "near" if spec.transposed else "far", "out": "far" if spec.transposed else "near"},
        )
    spread = spec.transposed != (spec.direction == "data")
    weight = "ic * OC_GROUP + oc % OC_GROUP" if spread or spec.mirrored else "oc * IC_GROUP + c"
    return filled(
        "example_layer.template.c",
        outputs=outputs,
        position=_TRANSPOSED_POSITION if spread else _POSITION,
        weight=weight,
        src_zero=" - *src_zero" * spec.src_zero,
        weights_zero=" - weights_zero[oc]" * spec.weights_zero,
        epilogue=epilogue,
        **{f"tap_{x}": f"(kernel[{i}] - 1 - {x})" if spec.mirrored else x for i, x in enumerate("dhw")},
    )


def _three(sizes: tuple[int, ...], missing: int) -> str:
    return ", ".join(map(str, (missing,) * (3 - len(sizes)) + sizes))


def _step(spec: ConvSpec) -> int:
    """How far apart the checked outputs are: coprime to every extent, so that all positions get their turn."""
    outputs = math.prod(spec.dst_shape)
    samples = max(1000, EXAMPLE_MACS // spec.reduction_length)
    step = max(1, -(-outputs // samples))
    while any(math.gcd(step, extent) > 1 for extent in _extents(spec)):
        step += 1
    return step


def _extents(spec: ConvSpec) -> tuple[int, ...]:
    """Of the axes of dst."""
    if spec.direction == "weights":
        return spec.weights_shape
    return spec.dst_blocks.channels, *spec.dst_spatial


def _allowed(spec: ConvSpec, factor: float | None) -> str:
    """The error that is allowed, in C: rounding before the activation, then the activation's own."""
    op = spec.activation_op
    if spec.is_quantised:
        return "0x1p-20 * magnitude" if spec.dst_dtype == "f32" else "0 * magnitude"
    if factor is None:
        factor = spec.reduction_length + 4
    # A transform's error depends on all of its tile: where a window's numbers happen to be small, take the mean of all,
    # 20/9 of those from -4 to 4 and 6/5 of those from -2 to 2.
    mean = spec.reduction_length * 20 / 9 * 6 / 5
    rounding = f"{float(factor * max(op.lipschitz, 1.0))!r} * 0x1p-24 * fmax(magnitude, {mean!r})"
    if not op.exact and op.name != "leaky_relu":
        rounding += " + 1e-5 * (1 + fabs(expected))"
    if spec.dtype != "f32":  # and dst is rounded once more
        rounding = (
            f"(fabs(expected) + {rounding}) * {UNIT_ROUNDOFF[spec.dtype]!r} + {UNDERFLOW[spec.dtype]!r} + {rounding}"
        )
    return rounding


def _activation(op: Activation) -> str:
    """The activation of ``x`` as a C expression; prelu's slope is that of channel ``oc``."""
    p = [repr(float(value)) for value in op.params]
    match op.name:
        case "none":
            return "x"
        case "relu":
            return "fmax(x, 0)"
        case "leaky_relu":
            return f"x < 0 ? x * {p[0]} : x"
        case "prelu":
            return "x < 0 ? x * value(slope[oc]) : x"
        case "clip":
            low, high = op.params
            inner = f"fmax(x, {p[0]})" if math.isfinite(low) else "x"
            return f"fmin({inner}, {p[1]})" if math.isfinite(high) else inner
        case "sigmoid":
            return "1 / (1 + exp(-x))"
        case "tanh":
            return "tanh(x)"
        case "silu":
            return "x / (1 + exp(-x))"
        case "mish":
            return "x * tanh(log1p(exp(x)))"
        case "hardswish":
            return "x * fmin(fmax(x / 6 + 0.5, 0), 1)"
        case "hardsigmoid":
            return f"fmin(fmax(x * {p[0]} + {p[1]}, 0), 1)"
        case "elu":
            return f"x < 0 ? {p[0]} * expm1(x) : x"
        case "gelu":
            return "0.5 * x * (1 + erf(x * sqrt(0.5)))"
        case "gelu_tanh":
            return "0.5 * x * (1 + tanh(sqrt(2 / acos(-1.0)) * (x + 0.044715 * x * x * x)))"
    raise ExportError(f"activation: expected one that example.c can show, found {op.name}")
