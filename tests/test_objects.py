"""Objects say what they are, and functions what to call with something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import stores
from commands import TINY

import convgen
from convgen.errors import SpecError
from convgen.hardware.target import resolve
from convgen.lowering.discover import schedules
from convgen.problem.spec import ConvSpec

SEPARABLE = convgen.SeparableSpec.parse("separable2d n1 ic8 oc8 i12x10 k3x3 p1x1 relu")


def test_a_spec_reads_back_from_its_repr() -> None:
    spec = ConvSpec.parse(TINY)
    assert eval(repr(spec), {"ConvSpec": ConvSpec}) == spec
    assert TINY in repr(convgen.SpecEntry(spec, 3, ("conv1",)))
    assert eval(repr(SEPARABLE), {"SeparableSpec": convgen.SeparableSpec}) == SEPARABLE


def test_objects_say_what_they_are() -> None:
    spec = ConvSpec.parse(TINY)
    kernel = convgen.build(spec, threads=1, records=False)
    layer = kernel.bind(np.zeros(spec.weights_shape, "f4"), np.zeros(spec.oc, "f4"))
    report = convgen.validate(kernel)
    record = stores.record(spec=TINY)
    for made, facts in {
        kernel: (TINY, "cpu:", "1 thread:", f"{kernel.schedule}(", "not measured"),
        layer: ("Layer", TINY, f"{len(layer.packed)} bytes"),
        kernel.target: ("cpu:", "1 core", f"{kernel.target.vector_bits} bits", "runs here"),
        report: (TINY, "passed", f"{len(report.checks)} checks"),
        record: (record.id[:12], TINY, "cpu_direct(", "1000 µs", "2 threads"),
    }.items():
        assert repr(made).startswith("<")
        assert [fact for fact in facts if fact not in repr(made)] == [], repr(made)


def test_no_public_object_has_the_repr_of_none() -> None:
    """That of ``object``, which says where it is in memory and nothing else."""
    target, spec = resolve("cpu"), ConvSpec.parse(TINY)
    for schedule in schedules().values():
        assert schedule.id in repr(schedule)
    reference = schedules()["reference"]
    assert repr(reference.space(spec, target)).startswith("Space(")
    public = (convgen.ConvSpec, convgen.Kernel, convgen.Layer, convgen.Library, convgen.Network, convgen.Report)
    assert [kind for kind in public if kind.__repr__ is object.__repr__] == []


class Module:
    """As a module of PyTorch looks from outside."""

    __module__ = "torch.nn.modules.conv"

    def state_dict(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (Module(), "convgen.spec_from_torch"),
        (Module(), "torch.export"),
        ("model.onnx", "convgen.compile"),
        (Path("model.onnx"), "convgen.compile"),
        (Path("layers.toml"), "convgen.read_specs"),
        ("layers.toml", "convgen.read_specs"),
        (onnx.ModelProto(), "convgen.compile"),
        (convgen.SpecEntry(ConvSpec.parse(TINY)), ".spec"),
        (SEPARABLE, "convgen.separable_model"),
        (SEPARABLE.descriptor, "convgen.separable_model"),
        (3, "found an int"),
    ],
)
def test_what_is_no_spec_is_told_what_takes_it(given: Any, said: str) -> None:
    for function in (convgen.build, convgen.tune):
        with pytest.raises(SpecError, match="spec: expected a ConvSpec or its descriptor") as raised:
            function(given)
        assert said in str(raised.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (Module(), "torch.export"),
        (ConvSpec.parse(TINY), "convgen.build"),
        (TINY, "convgen.build takes descriptors"),
        (SEPARABLE, "convgen.separable_model"),
        (SEPARABLE.descriptor, "convgen.separable_model"),
    ],
)
def test_what_is_no_model_is_told_what_takes_it(given: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="source: expected") as raised:
        convgen.compile(given)
    assert said in str(raised.value)
    with pytest.raises(SpecError, match="source: expected"):
        convgen.compile(given, seconds=1)
    with pytest.raises(SpecError, match="source: expected"):
        convgen.for_onnxruntime(given, tmp_path / "out.onnx")


def test_what_is_no_kernel_is_named() -> None:
    with pytest.raises(SpecError, match=r"kernel: expected what convgen\.build gives, found a str"):
        convgen.validate(TINY)  # type: ignore[arg-type]
