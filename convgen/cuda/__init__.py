"""NVIDIA GPUs: device code from lowered TIR, the driver, kernels on device memory, and their emulation."""
