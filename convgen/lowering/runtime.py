"""The C files that every library is linked with, and which of them each kind takes."""

from __future__ import annotations

from importlib import resources

#: Those of a kernel that runs on the CPU.
SOURCES = ("types.h", "cpu.h", "runtime.h", "pool.c", "kernel.c")
#: Those of a library that runs a whole network.
NETWORK_SOURCES = ("types.h", "network_types.h", "cpu.h", "runtime.h", "network.h", "pool.c", "kernel.c", "network.c")
#: Those of a library that packs the weights of a network's convolutions.
PACKING_SOURCES = ("types.h", "cpu.h", "runtime.h", "pool.c", "kernel.c", "packing.c")
#: The runtime's C files for a kernel that runs on a GPU.
CUDA_SOURCES = ("types.h", "cuda_types.h", "cpu.h", "runtime.h", "launch.h", "kernel.c", "launch.c")
#: Those of a library that runs a whole network on a GPU.
DEVICE_NETWORK_SOURCES = (
    *NETWORK_SOURCES,
    *("cuda_types.h", "launch.h", "launch.c", "network_cuda_types.h", "network_cuda.h", "network_cuda.c"),
)
#: Those of a library of ONNX Runtime's custom operators, beside the networks' own.
CUSTOM_OPS_SOURCES = ("types.h", "network_types.h", "runtime.h", "onnxruntime.h", "pool.c", "onnxruntime.c")


def source(name: str) -> str:
    """The text of one of the runtime's C files."""
    return resources.files("convgen").joinpath("runtime", name).read_text(encoding="utf-8")
