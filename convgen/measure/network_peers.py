"""Other libraries on whole models: what a model takes there, and what of it its convolutions take.

Each is used as its users would for speed. What a library's convolutions take inside the model is in its own profile
(:mod:`convgen.measure.profiles`), of sessions that are opened for a turn and closed again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..check.reference import open_session
from ..errors import UnsupportedError
from ..folders import TemporaryFolder
from ..processes import JobError, Worker
from .network_model import CONVOLUTIONS, MODEL, Array, NetworkModel, Part, Running, profiled, ready
from .peers import Ncnn, OnnxRuntime, OpenVino, Torch, f32_net
from .profiles import Profile, median_profile, onnxruntime_profiles, openvino_profile

#: Runs of a session that profiles: before what counts, and those that count.
BEFORE, COUNTED = 3, 5
#: Seconds that a model may take to be converted for ncnn.
CONVERTING = 300.0

# ---- ONNX Runtime ---------------------------------------------------------------------------------


def onnxruntime_parts(model: NetworkModel, threads: int, convolutions: bool = True) -> list[Part]:
    """The whole model with everything bound, and its convolutions."""
    version = OnnxRuntime.version()
    parts = [ready(model, Part("onnxruntime", version), lambda: bound_session(model, model.data, threads))]
    if convolutions:
        part = Part("onnxruntime", version, CONVOLUTIONS)
        parts.append(profiled(part, lambda: _onnxruntime_profile(model, threads)))
    return parts


def bound_session(model: NetworkModel, data: bytes, threads: int, library: Path | None = None) -> Running:
    """A session of ONNX Runtime with all inputs and outputs bound.

    Args:
        data: the model, or another one with the same inputs and outputs.
        library: of the custom operators that this one has.
    """
    import onnxruntime

    session = open_session(data, threads, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL, library=library)
    binding = session.io_binding()
    for name, array in model.inputs.items():
        binding.bind_cpu_input(name, array)
    outputs = {name: np.empty_like(array) for name, array in model.expected.items()}
    for name, array in outputs.items():
        binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    return Running(lambda: session.run_with_iobinding(binding), lambda: list(outputs.values()))


def _onnxruntime_profile(model: NetworkModel, threads: int) -> Profile:
    """The median over a few runs of a new session."""
    import onnxruntime

    level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    with TemporaryFolder() as folder:
        session = open_session(model.data, threads, level, profile=folder / "profile")
        for _ in range(BEFORE + COUNTED):
            session.run(None, model.inputs)
        events = json.loads(Path(session.end_profiling()).read_text())
    return median_profile(onnxruntime_profiles(events)[-COUNTED:])


# ---- OpenVINO -------------------------------------------------------------------------------------


def openvino_parts(model: NetworkModel, threads: int, convolutions: bool = True) -> list[Part]:
    """The whole model in f32 and in the precision that OpenVINO chooses, and the convolutions of both.

    There are models that its compiler crashes on, and this process with it: a process of its own compiles first.
    """
    version = OpenVino.version()
    chosen = "chosen"
    worker = Worker()
    try:
        with contextlib.suppress(JobError):  # where it fails, the parts say why
            chosen = worker.call(_chosen_precision, dataclasses.replace(model, module=None), threads)
    except ChildProcessError:
        crashed = f"its compiler crashes: {_ending(worker.status)}"
        return [Part("openvino", version, MODEL, model.precision, crashed)]
    finally:
        worker.stop()
    parts = []
    for precision in dict.fromkeys(("f32", chosen)):
        hint = "f32" if precision == "f32" else ""
        start = partial(_openvino, model, threads, hint)
        parts.append(ready(model, Part("openvino", version, MODEL, precision), start))
        if convolutions:
            profile = partial(_openvino_profile, model, threads, hint)
            parts.append(profiled(Part("openvino", version, CONVOLUTIONS, precision), profile))
    return parts


def _chosen_precision(model: NetworkModel, threads: int) -> str:
    """The precision that OpenVINO chooses for a model, which it compiles in this and in f32."""
    _compiled(model, threads, "f32")
    return str(_compiled(model, threads, "").get_property("INFERENCE_PRECISION_HINT").to_string())


def _ending(status: int | None) -> str:
    """How a process ended, in words."""
    return signal.strsignal(-status) or f"signal {-status}" if status and status < 0 else f"exit status {status}"


def _compiled(model: NetworkModel, threads: int, precision: str, profile: bool = False) -> Any:
    """The model compiled for latency; in the precision that OpenVINO chooses where none is named."""
    import openvino

    options: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "PERF_COUNT": profile,
    }
    if precision:
        options["INFERENCE_PRECISION_HINT"] = precision
    core = openvino.Core()
    read = core.read_model(model.data)
    if model.dims:
        read.reshape({name: list(array.shape) for name, array in model.inputs.items()})
    return core.compile_model(read, "CPU", options)


def _openvino(model: NetworkModel, threads: int, precision: str) -> Running:
    request = _openvino_request(model, _compiled(model, threads, precision))

    def outputs() -> list[Array]:
        return [np.array(request.get_tensor(name).data) for name in model.expected]

    return Running(partial(request.infer, share_outputs=True), outputs)


def _openvino_request(model: NetworkModel, compiled: Any) -> Any:
    import openvino

    request = compiled.create_infer_request()
    for name, array in model.inputs.items():
        request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
    return request


def _openvino_profile(model: NetworkModel, threads: int, precision: str) -> Profile:
    """Of a new request. Its times are averages over all runs so far: the slow first ones are taken out again."""
    request = _openvino_request(model, _compiled(model, threads, precision, profile=True))

    def executed(runs: int) -> dict[str, tuple[str, float]]:
        """Type and average seconds of each node that was executed, by name; not in every run are all of them."""
        for _ in range(runs):
            request.infer(share_outputs=True)
        found = [info for info in request.profiling_info if "NOT_RUN" not in str(info.status)]
        return {info.node_name: (info.node_type, info.real_time.total_seconds()) for info in found}

    first, all_ = executed(BEFORE), executed(COUNTED)
    runs, none = BEFORE + COUNTED, ("", 0.0)
    return openvino_profile(
        [
            (kind, max(0.0, runs * seconds - BEFORE * first.get(name, none)[1]) / COUNTED)
            for name, (kind, seconds) in all_.items()
        ]
    )


# ---- PyTorch --------------------------------------------------------------------------------------


def torch_parts(model: NetworkModel, threads: int, convolutions: bool = True) -> list[Part]:
    """``torch.compile`` with frozen weights, of models that are PyTorch modules."""
    return [ready(model, Part("torch", Torch.version()), partial(_torch, model, threads))]


def _torch(model: NetworkModel, threads: int) -> Running:
    if model.module is None:
        raise UnsupportedError("an ONNX file alone: expected the PyTorch module that it is from")
    import torch
    from torch._inductor import config

    torch.set_num_threads(threads)
    torch._dynamo.reset()  # code for another number of threads
    compiled = torch.compile(model.module())
    inputs = [torch.from_numpy(array) for array in model.inputs.values()]
    results: list[Any] = [None]

    def run() -> None:
        results[0] = compiled(*inputs)

    # With the weights frozen it chooses layouts; and no processes of its own stay behind to compile.
    with config.patch(freezing=True, compile_threads=1), torch.no_grad():
        run()

    def outputs() -> list[Array]:
        found = results[0] if isinstance(results[0], tuple) else (results[0],)
        return [tensor.numpy() for tensor in found]

    return Running(run, outputs, torch.no_grad)


# ---- ncnn -----------------------------------------------------------------------------------------


def ncnn_parts(model: NetworkModel, threads: int, convolutions: bool = True) -> list[Part]:
    """The model as pnnx converts it, in f32 with all of ncnn's algorithms. It takes one image."""
    return [ready(model, Part("ncnn", Ncnn.version()), partial(_ncnn, model, threads))]


def _ncnn(model: NetworkModel, threads: int) -> Running:
    import ncnn

    if len(model.inputs) != 1 or any(len(array) != 1 for array in model.inputs.values()):
        raise UnsupportedError("expected one input with a batch of 1, as ncnn takes")
    net = f32_net(threads)
    with TemporaryFolder() as folder:
        for path, load in zip(_converted(model, folder), (net.load_param, net.load_model), strict=True):
            if load(str(path)):
                raise UnsupportedError(f"cannot load {path.name}, which pnnx has made")
    (array,) = model.inputs.values()
    if array.dtype != np.float32:
        raise UnsupportedError(f"expected an input of f32, found {array.dtype}")
    mat, names = ncnn.Mat(array[0]), net.output_names()
    results: list[Any] = []

    def run(_memory: object = array) -> None:
        extractor = net.create_extractor()
        extractor.input(net.input_names()[0], mat)
        found = [extractor.extract(name) for name in names]
        if any(status for status, _ in found):
            raise UnsupportedError("failed while it ran")
        results[:] = [result for _, result in found]

    return Running(run, lambda: [np.array(result) for result in results])


def _converted(model: NetworkModel, folder: Path) -> tuple[Path, Path]:
    """The model's two files for ncnn."""
    try:
        program = Path(str(importlib.metadata.distribution("pnnx").locate_file("pnnx/pnnx")))
    except importlib.metadata.PackageNotFoundError:
        raise UnsupportedError("pnnx, which converts models for it, is not installed: pip install pnnx") from None
    (folder / "model.onnx").write_bytes(model.data)
    shapes = ",".join(f"[{','.join(map(str, array.shape))}]f32" for array in model.inputs.values())
    command = [str(program), "model.onnx", "fp16=0", f"inputshape={shapes}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=CONVERTING, check=False)
    files = folder / "model.ncnn.param", folder / "model.ncnn.bin"
    if done.returncode or not all(file.exists() for file in files):
        raise UnsupportedError(f"pnnx, which converts models for it, failed with status {done.returncode}")
    return files


#: Libraries by name, in the order in which they take turns: each gives its parts of a model on a number of threads,
#: without those of the convolutions where ``convolutions`` is False.
NETWORK_PEERS: dict[str, Callable[..., list[Part]]] = {
    "onnxruntime": onnxruntime_parts,
    "openvino": openvino_parts,
    "torch": torch_parts,
    "ncnn": ncnn_parts,
}
