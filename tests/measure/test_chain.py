"""A network's convolutions one after another: they compute what the network computes, each with its own weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_network import chain_model, kernels_for

from convgen.check.bounds import reference
from convgen.check.data import float_data
from convgen.errors import SpecError, UnsupportedError
from convgen.formats.entries import SpecEntry
from convgen.formats.onnx.reader import instances_from_onnx, layers_from_onnx, specs_from_onnx
from convgen.measure.chain import Chain
from convgen.measure.network_model import NetworkModel
from convgen.problem.spec import ConvSpec


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> NetworkModel:
    path = tmp_path_factory.mktemp("model") / "tiny.onnx"
    chain_model(path)
    return NetworkModel(path)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_chain_computes_what_onnxruntime_computes(model: NetworkModel, threads: int) -> None:
    layers = instances_from_onnx(model.path)
    parameters = [layer.arrays for layer in layers_from_onnx(model.path, arrays=True)]
    chain = Chain(layers, kernels_for(layers), threads, parameters=parameters)
    (src,), (expected,) = model.inputs.values(), model.expected.values()
    chain.src[:] = src
    chain()
    assert np.abs(chain.output() - expected).max() <= 1e-4 * np.abs(expected).max()


def test_instances_are_in_the_order_of_the_graph(model: NetworkModel) -> None:
    layers = instances_from_onnx(model.path)
    assert [layer.names for layer in layers] == [("first",), ("second",), ("third",), ("fourth",)]
    assert layers[1].spec == layers[2].spec
    assert [entry.count for entry in specs_from_onnx(model.path)] == [1, 2, 1]


def test_two_instances_share_code_but_no_weights() -> None:
    spec = ConvSpec.parse("conv2d n1 ic8 oc8 i6x6 k3x3 p1x1 relu")
    first, second = float_data(spec, 1), float_data(spec, 2)
    parameters = [{name: data[name] for name in spec.parameters} for data in (first, second)]
    chain = Chain([SpecEntry(spec, 2)], kernels_for([SpecEntry(spec)]), parameters=parameters)
    chain.src[:] = first["src"]
    chain()
    expected = reference(spec, second | {"src": reference(spec, first, 1)}, 1)
    assert np.abs(chain.output() - expected).max() <= 1e-4 * np.abs(expected).max()
    random = [Chain([SpecEntry(spec, 2)], chain.kernels, seed=seed).output() for seed in (0, 0, 1)]
    np.testing.assert_array_equal(random[0], random[1])
    assert not np.array_equal(random[0], random[2])


def test_a_chain_with_residuals_stays_of_one_scale() -> None:
    spec = ConvSpec.parse("conv2d n1 ic8 oc8 i6x6 k3x3 p1x1 residual relu")
    chain = Chain([SpecEntry(spec, 40)], kernels_for([SpecEntry(spec)]))
    assert len(chain.calls) == 40
    assert 0.1 < chain.output().std() < 10


def test_layers_of_other_sizes_share_the_buffers() -> None:
    small, large = "conv2d n1 ic4 oc4 i5x5 k1x1", "conv2d n1 ic8 oc16 i9x9 k3x3 p1x1"
    layers = [SpecEntry(ConvSpec.parse(text)) for text in (small, large, small)]
    chain = Chain(layers, kernels_for(layers))
    assert chain.output().shape == (1, 4, 5, 5)
    assert len(chain.instance_seconds(2)) == 3
    assert set(chain.warm_seconds(1)) == {layer.spec for layer in layers}


def test_a_chain_of_integers() -> None:
    spec = ConvSpec.parse("conv2d n1 ic8 oc8 i6x6 k3x3 p1x1 i8")
    chain = Chain([SpecEntry(spec, 2)], kernels_for([SpecEntry(spec)]))
    data = float_data(spec, 7)
    one = Chain([SpecEntry(spec)], chain.kernels, parameters=[{n: data[n] for n in spec.parameters}])
    one.src[:] = data["src"]
    one()
    np.testing.assert_array_equal(one.output(), reference(spec, data, 1))


def test_a_kernel_of_another_layout_stands_for_a_layer() -> None:
    spec = ConvSpec.parse("conv2d n1 ic4 oc6 i5x7 k3x3 p1x1")
    kernel = kernels_for([SpecEntry(spec.with_(layout="nhwc"))])[spec.with_(layout="nhwc")]
    chain = Chain([SpecEntry(spec)], {spec: kernel})
    assert (chain.src.shape, chain.output().shape) == ((1, 5, 7, 4), (1, 5, 7, 6))
    assert chain.layers[0].spec == spec


def test_what_a_chain_refuses() -> None:
    f32, f16 = (ConvSpec.parse(f"conv2d n1 ic4 oc4 i5x5 k1x1{dtype}") for dtype in ("", " f16"))
    empty = f32.with_(n=0)
    kernels = kernels_for([SpecEntry(spec) for spec in (f32, f16, empty)])
    with pytest.raises(SpecError, match="layers"):
        Chain([], {})
    with pytest.raises(UnsupportedError, match="one dtype, as they share buffers, found f16, f32"):
        Chain([SpecEntry(f32), SpecEntry(f16)], kernels)
    with pytest.raises(UnsupportedError, match="expected one for conv2d"):
        Chain([SpecEntry(f32)], {})
    with pytest.raises(SpecError, match="batch"):
        Chain([SpecEntry(empty)], kernels)


def test_a_layer_that_is_refused_is_named(tmp_path: Path) -> None:
    path = tmp_path / "strange.onnx"
    chain_model(path, strange=True)
    with pytest.raises(UnsupportedError, match="dtype double"):
        instances_from_onnx(path)
    skipped: list[str] = []
    assert len(instances_from_onnx(path, skipped=skipped)) == 4
    assert "dtype double" in skipped[0]
