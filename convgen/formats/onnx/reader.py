"""The convolutions of an ONNX model as specs.

A file is read in a process of its own, of limited memory and time: it may come from anywhere, and what
parses it and infers its shapes is not ours. A model in memory is read in this process.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ConvgenError, SpecError, UnsupportedError
from ...folders import TemporaryFolder
from ...problem.dtypes import load
from ...problem.spec import ConvSpec
from ..entries import SpecEntry, merge
from .node import OnnxLayer

if TYPE_CHECKING:
    from onnx import ModelProto

#: Of the process that reads a file: seconds, and bytes unless it reads weights, too.
TIMEOUT, MEMORY = 120, 2 << 30


def specs_from_onnx(
    source: str | Path | ModelProto, dims: Mapping[str, int] | None = None, skipped: list[str] | None = None
) -> list[SpecEntry]:
    """The nodes of a model that convolve as specs, identical ones merged.

    See :func:`layers_from_onnx`. The first node that is refused raises its error, or, where ``skipped``
    is given, each of them is left out and the reason appended there.
    """
    return merge(instances_from_onnx(source, dims, skipped))


def instances_from_onnx(
    source: str | Path | ModelProto, dims: Mapping[str, int] | None = None, skipped: list[str] | None = None
) -> list[SpecEntry]:
    """One entry for each node of :func:`specs_from_onnx` in the order of the graph, identical ones apart: a model's
    convolutions as they run one after another.
    """
    layers = layers_from_onnx(source, dims)
    for refusal in [layer.refusal for layer in layers if layer.refusal]:
        if skipped is None:
            raise refusal
        skipped.append(str(refusal))
    return [SpecEntry(layer.spec, 1, (layer.name,)) for layer in layers if layer.spec]


def layers_from_onnx(
    source: str | Path | ModelProto, dims: Mapping[str, int] | None = None, *, arrays: bool = False
) -> list[OnnxLayer]:
    """The nodes of a model that convolve, those inside functions and subgraphs included.

    Read are Conv, ConvTranspose, QLinearConv and ConvInteger, and of ONNX Runtime's own FusedConv, NhwcFusedConv and
    QLinearConv. Others that convolve by their name, of any domain, are there with a refusal. Shapes are derived from
    the inputs' and from constants; what the file stores about values between is used where nothing else tells, unless
    a part of it is another graph's. Nodes may stand in any order; of an If whose condition is a constant the branch
    that is taken stands in its place.

    What follows a node is folded into its spec when that is exact and nothing else uses the value
    between: a scale or shift per channel that is known beforehand (BatchNormalization, or arithmetic
    with constants; it goes into weights and bias), one tensor added (residual), then one activation in
    any of its spellings. So is a Pad with zeros before it. Where two convolutions meet in one addition,
    the one with more convolutions before it takes it: the other's output is there by then (of a ResNet
    block: the main path, not the shortcut). Before opset 7, nothing is folded. A QLinearConv of 8-bit integers
    with zero points 0 and constant scales is a layer of i8; a Relu alone is folded into it.

    Args:
        source: a path or a model. Its weights may be inputs; their data is read only for ``arrays``.
        dims: sizes of symbolic dimensions, ``{"N": 1}``; a dimension without a symbol is called
            ``"input[axis]"``.
        arrays: read the parameters as well.

    Returns:
        One layer per node in the order of the graph; what cannot be read has its refusal: a
        SpecError (a shape that is not known, a wrong attribute) or an UnsupportedError (a dtype or
        rank that specs lack, an operator that is not read).

    Raises:
        SpecError: not an ONNX model, no convolution in it, or shapes that contradict each other.
    """
    for name, size in (dims or {}).items():
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size < 2**63:
            raise SpecError(f"dims[{name}]", "an integer >= 0", repr(size))
    if not isinstance(source, str | os.PathLike):
        from .layers import read_layers

        return read_layers(source, dims or {}, arrays)
    path, dims = os.fspath(source), dict(dims or {})
    if not arrays:
        return _isolated(path, dims, None)
    with TemporaryFolder() as folder:
        return _isolated(path, dims, str(folder))


# ---- the process that reads a file ------------------------------------------------------------


def _isolated(path: str, dims: Mapping[str, int], directory: str | None) -> list[OnnxLayer]:
    memory = MEMORY if directory is None else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = {"RLIMIT_AS": memory, "RLIMIT_CPU": math.ceil(TIMEOUT), "RLIMIT_CORE": 0}
    job = {"path": path, "dims": dims, "directory": directory, "limits": limits}
    command = [sys.executable, "-P", "-m", "convgen.formats.onnx.layers"]  # -P: no module of the working directory
    options: dict[str, Any] = {"env": os.environ | {"OPENBLAS_NUM_THREADS": "1"}}  # each thread reserves memory
    options |= {"capture_output": True, "encoding": "utf-8", "errors": "replace", "timeout": TIMEOUT}
    try:
        child = subprocess.run(command, input=json.dumps(job), check=False, **options)
    except subprocess.TimeoutExpired:
        raise SpecError("file", f"a model that can be read in {TIMEOUT} s", "another one", path) from None
    if child.returncode:
        cause = f"signal {-child.returncode}" if child.returncode < 0 else child.stderr.strip().rpartition("\n")[2]
        raise SpecError("file", "a model that can be read", f"one that ended its reader: {cause}", path)
    answer = json.loads(child.stdout)
    if "error" in answer:
        raise _error(answer["error"])
    return [_layer(index, plain, directory) for index, plain in enumerate(answer["layers"])]


def _layer(index: int, plain: dict[str, Any], directory: str | None) -> OnnxLayer:
    fields, refusal = plain.pop("spec"), plain.pop("refusal")
    spec = ConvSpec.from_dict(fields) if fields else None
    dtypes = spec.dtypes if spec else {}
    arrays = {name: load(Path(directory or "", f"{index}.{name}.npy"), dtypes[name]) for name in plain.pop("arrays")}
    return OnnxLayer(**plain, spec=spec, refusal=_error(refusal) if refusal else None, arrays=arrays)


def _error(told: list[str]) -> ConvgenError:
    return SpecError(*told) if len(told) == 4 else UnsupportedError(*told)
