"""ONNX Runtime as the reference: what a spec's output must be, and the time it takes there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import ModelProto

from ..errors import SpecError
from ..hardware.machine import machine
from ..problem.dtypes import narrow, numpy_dtype, widen
from ..problem.spec import ConvSpec
from .onnx_model import checked, onnx_model

Array = npt.NDArray[Any]


def session_options(threads: int, level: ort.GraphOptimizationLevel) -> ort.SessionOptions:
    """Of a session that computes products of integers as they are defined, and says errors only."""
    options = ort.SessionOptions()
    # Without VNNI it saturates sums of pairs of products of 8-bit integers at 16 bits unless told not to. With VNNI the
    # same takes two to three times as long for nothing, and fails where layers share weights.
    if machine().features.isdisjoint(("avx512vnni", "avxvnni")):
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = level
    options.log_severity_level = 3
    return options


def open_session(
    model: bytes,
    threads: int,
    level: ort.GraphOptimizationLevel,
    profile: Path | None = None,
    library: Path | None = None,
) -> ort.InferenceSession:
    """A session on the CPU.

    Args:
        profile: the beginning of the name of a file to write a profile to; see ``session.end_profiling()``.
        library: of the custom operators that the model has.
    """
    options = session_options(threads, level)
    if library is not None:
        options.register_custom_ops_library(str(library))
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _data(
    spec: ConvSpec, src: npt.ArrayLike, residual: npt.ArrayLike | None, **parameters: npt.ArrayLike | None
) -> dict[str, Array]:
    """The given arrays by name, checked against what the spec takes."""
    shapes = {name: shape for name, shape in spec.shapes.items() if name != "dst"}
    given = {"src": src, "residual": residual, **parameters}
    for name in shapes.keys() | given.keys():
        array = given.get(name)
        if (array is None) == (name in shapes):
            raise SpecError(
                name, "an array" if name in shapes else "none", "none" if array is None else "one", str(spec)
            )
    return {name: checked(spec, name, array, shapes[name]) for name, array in given.items() if array is not None}


def run_onnxruntime(
    spec: ConvSpec,
    src: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    slope: npt.ArrayLike | None = None,
    residual: npt.ArrayLike | None = None,
    *,
    threads: int = 1,
    **others: Any,
) -> Array:
    """The spec's output ``dst_shape``, computed once: weights fed as inputs, nothing fused.

    f16 and bf16 layers are computed in f32 and their output rounded: that is what they mean. i8 is computed as such.

    Raises:
        SpecError: an array is missing, superfluous or of the wrong shape or dtype.
    """
    data = _data(spec, src, residual, weights=weights, bias=bias, slope=slope, **others)
    return OrtDefinition(spec, threads)(data)


class OrtDefinition:
    """What a spec means, opened once for any data: :func:`run_onnxruntime` of many."""

    def __init__(self, spec: ConvSpec, threads: int = 1) -> None:
        self.spec = spec
        computed = spec if spec.is_quantised else spec.with_(dtype="f32")
        model = onnx_model(computed).SerializeToString()
        self._session = open_session(model, threads, ort.GraphOptimizationLevel.ORT_DISABLE_ALL)

    def __call__(self, data: Mapping[str, Array]) -> Array:
        """The output for the tensors of a call by name, of the spec's shapes and dtypes."""
        given = dict(data) if self.spec.is_quantised else {name: widen(array) for name, array in data.items()}
        return narrow(np.asarray(self._session.run(["dst"], given)[0]), self.spec.dst_dtype)


class OrtReference:
    """A spec prepared in ONNX Runtime as a user of it would for speed.

    Constant weights, full graph optimisation, ``threads`` threads, inputs bound and the output
    allocated once. Calling it runs the layer into :attr:`output` and nothing else: that is what is
    timed. An NHWC spec includes the transposes, as ONNX has no other convolution.

    Args:
        src, weights, bias, slope, residual, others: arrays as in :func:`run_onnxruntime`; src and
            residual are kept, so that writing to them changes the next run's input.
        model: another model of the layer with its parameters, such as one that is faster; the one that says what it
            means by default.

    Raises:
        SpecError: an array is missing, superfluous or of the wrong shape or dtype.
    """

    def __init__(
        self,
        spec: ConvSpec,
        src: npt.ArrayLike,
        weights: npt.ArrayLike | None = None,
        bias: npt.ArrayLike | None = None,
        slope: npt.ArrayLike | None = None,
        residual: npt.ArrayLike | None = None,
        *,
        threads: int = 1,
        model: ModelProto | None = None,
        **others: Any,
    ) -> None:
        data = _data(spec, src, residual, weights=weights, bias=bias, slope=slope, **others)
        inputs = {name: data[name] for name in ("src", "residual") if name in data}
        level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        if spec.dtype == "i8" and model is None:  # what it then puts in place of QLinearConv takes no i8 (1.31)
            level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        model = model or onnx_model(spec, **{name: data[name] for name in spec.parameters})
        self.spec, self.threads = spec, threads
        self.output: Array = np.empty(spec.dst_shape, numpy_dtype(spec.dst_dtype))
        self._inputs = inputs  # bound by address: they must live as long as the session
        self.session = open_session(model.SerializeToString(), threads, level)
        self._binding = self.session.io_binding()
        for name, array in inputs.items():
            self._binding.bind_cpu_input(name, array)
        self._binding.bind_output("dst", "cpu", 0, self.output.dtype, self.output.shape, self.output.ctypes.data)

    def __call__(self) -> None:
        """Run the layer into :attr:`output`."""
        self.session.run_with_iobinding(self._binding)

    def run(self) -> Array:
        """A copy of the output of one run, ``dst_shape``."""
        self()
        return self.output.copy()
