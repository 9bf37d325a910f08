"""Kernels for tests of linking, loading and exporting: slow to run, quick to build."""

from __future__ import annotations

import functools
import math
import platform
from pathlib import Path
from typing import Any

import numpy as np

from convgen.hardware.target import Target
from convgen.lowering.interface import Interface
from convgen.lowering.link import link
from convgen.lowering.lower import compile_object, lower
from convgen.lowering.schedule import Candidate
from convgen.problem.activation import Activation
from convgen.problem.spec import ConvSpec

#: The baseline of this machine's architecture: tests run wherever the compiler does.
TARGET = Target(
    kind="cpu",
    spelling=f"cpu:{platform.machine()}",
    tvm_config='{"kind": "llvm"}',
    vector_bits=128,
    vector_registers=16,
    isa=(),
    l1=32 << 10,
    l2=512 << 10,
    l3=8 << 20,
    cores=2,
    native=True,
    hardware="any",
)


@functools.cache
def _schedules() -> dict[str, Any]:
    from convgen.schedules.reference import Reference

    class Staged(Reference):
        """Sums in the workspace of the call."""

        def apply(self, sch: Any, spec: ConvSpec, target: Target, picks: Any) -> None:
            sch.parallel(sch.fuse(*sch.get_loops(sch.get_sblock("dst"))[:-1]))

    class Shared(Reference):
        """Sums in the workspace of each task: a channel's plane (NCHW), a row's (NHWC)."""

        def apply(self, sch: Any, spec: ConvSpec, target: Target, picks: Any) -> None:
            dst = sch.get_sblock("dst")
            n, first, *_ = sch.get_loops(dst)
            outer = sch.fuse(n, first)
            sch.compute_at(sch.get_sblock("acc"), outer, preserve_unit_loops=True)
            sch.parallel(outer)

    return {"reference": Reference(), "staged": Staged(), "shared": Shared()}


def compile_naive(
    spec: ConvSpec, folder: Path, how: str = "reference", name: str = "", isa: tuple[str, ...] = ()
) -> tuple[Interface, Path]:
    """The interface and object file of a kernel."""
    schedule = _schedules()[how]
    lowered = lower(spec, TARGET, Candidate(schedule, schedule.default(spec, TARGET)))
    path = folder / f"{name or spec.name}-{how}.o"
    workspace = compile_object(lowered, path)
    return Interface(name or spec.name, spec, lowered.packed, workspace.main, workspace.task, isa), path


def link_naive(spec: ConvSpec, folder: Path, how: str = "reference", name: str = "") -> tuple[Interface, Path]:
    """The interface and shared library of a kernel."""
    interface, path = compile_naive(spec, folder, how, name)
    return interface, link(interface, path, folder / f"lib{interface.name}.so")


def whole_numbers(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """float32 between -4 and 4."""
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


def operands(spec: ConvSpec, seed: int = 0) -> dict[str, np.ndarray]:
    """All inputs of a spec by name."""
    inputs = {"src": whole_numbers(spec.src_shape, seed), "weights": whole_numbers(spec.weights_shape, seed + 1)}
    if spec.bias:
        inputs["bias"] = whole_numbers((spec.oc,), seed + 2)
    if spec.has_slope:
        inputs["slope"] = whole_numbers((spec.oc,), seed + 3)
    if spec.residual:
        inputs["residual"] = whole_numbers(spec.dst_shape, seed + 4)
    return inputs


def convolve(spec: ConvSpec, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The layer's output in float64, tap by tap; none and relu only."""
    assert Activation.parse(spec.activation).name in ("none", "relu", "prelu")
    first = spec.layout == "nhwc"
    src = np.moveaxis(inputs["src"], -1, 1) if first else inputs["src"]
    weights, groups = inputs["weights"].astype(np.float64), spec.groups
    split = src.reshape(spec.n, groups, spec.ic // groups, *spec.in_spatial).astype(np.float64)
    if spec.transposed:
        w = weights.reshape(groups, spec.ic // groups, spec.oc // groups, *spec.kernel).swapaxes(1, 2)
        full = [(i - 1) * s + k for i, s, k in zip(spec.in_spatial, spec.stride, spec.window, strict=True)]
        sums = np.zeros(
            (spec.n, groups, spec.oc // groups, *(f + o for f, o in zip(full, spec.output_padding, strict=True)))
        )
    else:
        w = weights.reshape(groups, spec.oc // groups, spec.ic // groups, *spec.kernel)
        split = np.pad(split, [(0, 0)] * 3 + list(spec.padding))
        sums = np.zeros((spec.n, groups, spec.oc // groups, *spec.out_spatial))
    count = spec.in_spatial if spec.transposed else spec.out_spatial
    for tap in np.ndindex(*spec.kernel):
        where = tuple(
            slice(t * d, t * d + (c - 1) * s + 1, s)
            for t, d, c, s in zip(tap, spec.dilation, count, spec.stride, strict=True)
        )
        at = (slice(None),) * 3
        if spec.transposed:
            sums[at + where] += np.einsum("ngi...,goi->ngo...", split, w[at + tap])
        else:
            sums += np.einsum("ngi...,goi->ngo...", split[at + where], w[at + tap])
    if spec.transposed:
        crop = tuple(slice(b, b + o) for (b, _), o in zip(spec.padding, spec.out_spatial, strict=True))
        sums = sums[(slice(None),) * 3 + crop]
    out = sums.reshape(spec.n, spec.oc, *spec.out_spatial)
    channel = (1, spec.oc) + (1,) * spec.rank
    if spec.bias:
        out = out + inputs["bias"].reshape(channel)
    if spec.residual:
        out = out + (np.moveaxis(inputs["residual"], -1, 1) if first else inputs["residual"])
    if spec.activation == "relu":
        out = np.maximum(out, 0)
    if spec.has_slope:
        out = np.where(out < 0, out * inputs["slope"].reshape(channel), out)
    assert math.prod(out.shape) == math.prod(spec.dst_shape)
    return np.moveaxis(out, 1, -1) if first else out
