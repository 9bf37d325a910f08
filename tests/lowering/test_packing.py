"""Packing: in whatever order weights are packed, and by how many threads, the bytes are those of the expressions."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from convgen.check.data import float_data
from convgen.cpu.weights import WeightRows
from convgen.cpu.winograd import Grid
from convgen.hardware.target import resolve
from convgen.kernel.kernel import compile_candidate
from convgen.lowering import lower as lowering
from convgen.lowering.candidates import predicted
from convgen.lowering.compute import STORAGE
from convgen.lowering.discover import schedules_of
from convgen.lowering.schedule import Candidate
from convgen.problem.spec import PARAMETERS, ConvSpec

tvm: Any = pytest.importorskip("tvm")

#: Layers whose weights are large, by what is particular about how they are packed.
LAYERS = {
    "plain": "conv2d n1 ic48 oc64 i9x8 k3x3 s1x1 p1x1",
    "channels left over": "conv2d n1 ic37 oc75 i9x8 k3x3 s1x1 p1x1 relu",
    "pointwise": "conv2d n1 ic128 oc96 i5x4 k1x1 s1x1 p0x0",
    "mirrored": "conv2d n1 ic64 oc48 i9x8 k3x3 s1x1 p1x1 data",
    "mirrored, channels left over": "conv2d n1 ic69 oc40 i9x8 k3x3 s1x1 p1x1 data",
    "grouped": "conv2d n1 ic128 oc128 g8 i9x8 k3x3 s1x1 p1x1",
    "narrow groups": "conv2d n1 ic288 oc288 g96 i9x8 k3x5 s1x1 p1x2",
    "depthwise": "conv2d n1 ic520 oc520 g520 i9x9 k5x5 s1x1 p2x2",
    "strided": "conv2d n1 ic32 oc48 i16x16 k4x4 s2x2 p1x1",
    "gradient of a strided one": "conv2d n2 ic48 oc64 i9x8 k3x3 s2x2 p1x1 data",
    "transposed": "convtranspose2d n1 ic40 oc50 i6x6 k4x4 s2x2 p1x1",
    "one axis": "conv1d n1 ic64 oc72 i40 k5 s1 p2",
    "three axes": "conv3d n1 ic32 oc32 i4x6x6 k3x3x3 s1x1x1 p1x1x1",
    "few input channels": "conv2d n1 ic3 oc160 i32x32 k7x7 s2x2 p3x3",
    "blocks of a strided one, read in ranges of no known length": "conv2d n1 ic384 oc768 i4x4 k2x2 s2x2 p0x0 nchw16c",
    "bf16": "conv2d n1 ic48 oc64 i9x8 k3x3 s1x1 p1x1 bf16",
    "bf16 products": "conv2d n1 ic48 oc64 i9x8 k3x3 s1x1 p1x1 accuracy_bf16",
    "f16": "conv2d n1 ic48 oc64 i9x8 k3x3 s1x1 p1x1 f16",
    "integers": "conv2d n1 ic48 oc64 i9x8 k3x3 s1x1 p1x1 i8 src_u8",
}


CASES = [(layer, target) for target in ("cpu", "cpu:haswell") for layer in LAYERS]
CASES += [(layer, target) for target in ("cuda:sm_80", "cuda:sm_90a") for layer in ("plain", "grouped", "transposed")]


def packed(spec: ConvSpec, target: str, candidate: Candidate, data: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    """What a candidate packs of a layer's parameters, compiled for this machine."""
    lowered = lowering.lower(spec, resolve(target), candidate)
    code = tvm.compile(tvm.IRModule({"pack": lowered.module["pack"]}), tvm.target.Target(json.loads(CONFIG))).jit()
    core = spec.core
    arrays = [data[name].reshape(core.shapes[name]) for name in core.parameters]
    given = [tvm.runtime.tensor(a.view(np.uint16) if a.dtype.name == "bfloat16" else a) for a in arrays]
    made = [tvm.runtime.empty(info.shape, STORAGE[info.dtype]) for info in lowered.packed]
    code["pack"](*given, *made)
    return [tensor.numpy() for tensor in made]


CONFIG = resolve("cpu").tvm_config


@pytest.mark.parametrize(("layer", "target"), CASES)
def test_packed_bytes_are_those_of_the_expressions(layer: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each schedule's, as it is packed and by plain loops in the order in which the expressions are written."""
    spec = ConvSpec.parse(LAYERS[layer])
    data, seen = float_data(spec), 0
    for schedule in schedules_of(resolve(target).kind).values():
        if schedule.reason_against(spec.core, resolve(target)) is None:
            candidate = Candidate(schedule, schedule.default(spec.core, resolve(target)))
            quick = packed(spec, target, candidate, data)
            with monkeypatch.context() as patched:
                patched.setattr(lowering, "schedule_packing", lambda sch, tensors: None)
                patched.setattr(WeightRows, "are_apart", False)  # else transposed in registers
                plain = packed(spec, target, candidate, data)
            for made, expected in zip(quick, plain, strict=True):
                np.testing.assert_array_equal(made.view(np.uint8), expected.view(np.uint8), str(candidate))
            seen += 1
    assert seen


def test_threads_pack_the_same_bytes() -> None:
    spec = ConvSpec.parse("conv2d n1 ic96 oc128 i9x8 k3x3 s1x1 p1x1")
    data, target = float_data(spec), resolve()
    parameters = {name: data[name] for name in PARAMETERS if name in data}
    for schedule in ("cpu_direct", "cpu_winograd"):
        chosen = schedules_of("cpu")[schedule]
        candidate = Candidate(chosen, chosen.default(spec.core, target))
        kernels = [compile_candidate(spec, target, candidate, threads) for threads in (1, 2, 5)]
        made = [kernel.pack(**parameters) for kernel in kernels]
        for other in made[1:]:
            np.testing.assert_array_equal(other[64:], made[0][64:])
            np.testing.assert_array_equal(other[40:48], made[0][40:48])  # the checksum, whoever adds it up
        assert all(kernel.verify_packed(given) for kernel, given in zip(kernels, made, strict=True))


#: Layers whose transformed weights are checked: with channels and taps left over, of every way that weights lie.
TRANSFORMED = [
    "conv2d n1 ic37 oc75 i9x8 k3x3 s1x1 p1x1",
    "conv2d n1 ic69 oc40 i9x8 k3x3 s1x1 p1x1 data",
    "conv2d n1 ic128 oc96 g2 i9x8 k3x3 s1x1 p1x1 data",
    "conv2d n1 ic96 oc64 g2 i9x8 k3x5 s1x1 p1x2 f16",
    "conv2d n1 ic32 oc48 i16x16 k3x3 s2x2 p1x1 bf16",
    "convtranspose2d n1 ic40 oc50 i6x6 k4x4 s2x2 p1x1",
    "conv1d n1 ic20 oc72 i40 k3 s1 p1",
    "conv3d n1 ic20 oc32 i4x6x6 k3x3x3 s1x1x1 p1x1x1",
]


@pytest.mark.parametrize("target", ["cpu", "cpu:haswell"])
@pytest.mark.parametrize("layer", TRANSFORMED)
def test_winograd_packs_weights_times_matrices(layer: str, target: str) -> None:
    """``G w G^T`` by NumPy in f64, for every channel; zeros past the last one."""
    spec = ConvSpec.parse(layer)
    core, data = spec.core, float_data(spec)
    schedule = schedules_of("cpu")["cpu_winograd"]
    picks = schedule.default(core, resolve(target))
    [made, *_] = packed(spec, target, Candidate(schedule, picks), data)
    g = Grid(core, resolve(target), picks)
    weights = data["weights"].reshape(core.shapes["weights"]).astype(np.float64)
    if core.mirrored:  # [ic][oc] of each group, taps the other way round
        weights = weights.reshape(core.groups, g.own, g.outputs, *core.kernel).swapaxes(1, 2)
        weights = np.flip(weights, tuple(range(3, weights.ndim)))
    elif core.transposed:
        weights = weights.reshape(core.groups, g.own, g.outputs, *core.kernel).swapaxes(1, 2)
    rows, columns = (np.array(axis.weights) for axis in (g.rows, g.columns))
    taps = weights.reshape(core.groups, g.outputs, g.own, -1, rows.shape[1], columns.shape[1])
    expected = np.einsum("iy,jx,gocdyx->goijdc", rows, columns, taps)
    expected = expected.reshape(core.groups, g.outputs, g.positions, -1, g.own)
    blocks, tile = made.shape[0] // core.groups, made.shape[-1]
    found = np.moveaxis(made, -1, 1).reshape(core.groups, blocks * tile, *expected.shape[2:])
    np.testing.assert_allclose(found[:, : g.outputs], expected, rtol=0, atol=1e-6 * float(np.abs(expected).max()))
    assert not found[:, g.outputs :].any()


@pytest.mark.parametrize("target", ["cpu:znver4", "cpu:haswell"])
def test_weights_that_are_packed_at_every_call_are_packed_in_less_memory(target: str) -> None:
    """Where there are many for few pixels. Both choices are what they say, and the second includes the first."""
    spec, where = ConvSpec.parse("conv2d n1 ic256 oc256 i14x14 k3x3 s1x1 p1x1"), resolve(target).on(1)
    sizes = []
    for repacked in (False, True):
        seconds, candidate = predicted(spec, where, repacked=repacked)
        weights, *_ = lowering.lower(spec, where, candidate).packed
        sizes.append((seconds, int(np.prod(weights.shape))))
    (once, large), (always, small) = sizes
    assert small < large
    assert once < always
