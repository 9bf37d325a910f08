"""Functional models of Keras 2 and 3: shapes go along their nodes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from convgen.errors import ConvgenError, SpecError, UnsupportedError
from convgen.formats.keras import specs_from_keras
from convgen.formats.sources import read_specs

CONV = {"filters": 8, "kernel_size": [3, 3], "padding": "same"}


def layer(kind: str, name: str, inputs: list[Any], **config: Any) -> dict[str, Any]:
    """A layer of Keras 2; each of its ``inputs`` is the names of one call's."""
    nodes = [[[*((one, 0) if isinstance(one, str) else one), 0, {}] for one in call] for call in inputs]
    return {"class_name": kind, "name": name, "config": {"name": name, **config}, "inbound_nodes": nodes}


def model(layers: list[dict[str, Any]], inputs: list[str], outputs: list[str], name: str = "m") -> dict[str, Any]:
    ends = {"input_layers": [[one, 0, 0] for one in inputs], "output_layers": [[one, 0, 0] for one in outputs]}
    return {"class_name": "Functional", "keras_version": "2.11.0", "config": {"name": name, "layers": layers, **ends}}


def in_keras_3(value: Any) -> Any:
    """The same, as Keras 3 writes nodes."""
    if isinstance(value, list):
        return [in_keras_3(item) for item in value]
    if not isinstance(value, dict):
        return value
    changed = {key: in_keras_3(item) for key, item in value.items() if key != "inbound_nodes"}
    if "inbound_nodes" in value:
        changed["inbound_nodes"] = []
        for call in value["inbound_nodes"]:
            tensors = [
                {"class_name": "__keras_tensor__", "config": {"shape": [9, 9], "keras_history": history[:3]}}
                for history in call
            ]
            args = tensors if len(tensors) < 2 else [tensors]
            changed["inbound_nodes"].append({"args": args, "kwargs": {"mask": None, "training": False}})
    return changed


def source(name: str = "x", shape: tuple[int | None, ...] = (None, 32, 32, 3)) -> dict[str, Any]:
    return layer("InputLayer", name, [], batch_input_shape=list(shape))


BLOCK = [
    source(),
    layer("Conv2D", "c1", [["x"]], **CONV),
    layer("MaxPooling2D", "pool", [["c1"]], pool_size=[2, 2]),
    layer("Conv2D", "a", [["pool"]], **CONV),
    layer("GlobalAveragePooling2D", "squeeze", [["a"]]),
    layer("Reshape", "image", [["squeeze"]], target_shape=[1, 1, -1]),
    layer("Conv2D", "gate", [["image"]], filters=8, kernel_size=[1, 1], activation="sigmoid"),
    layer("Multiply", "scaled", [["a", "gate"]]),
    layer("Add", "sum", [["scaled", "pool"]]),
    layer("Concatenate", "both", [["sum", "a"]], axis=-1),
    layer("Conv2D", "last", [["both"]], **CONV),
]
SEEN = [
    "conv2d n1 ic3 oc8 i32x32 k3x3 p1 nhwc",
    "conv2d n1 ic8 oc8 i16x16 k3x3 p1 nhwc",
    "conv2d n1 ic8 oc8 i1x1 k1x1 sigmoid nhwc",
    "conv2d n1 ic16 oc8 i16x16 k3x3 p1 nhwc",
]


def read(config: dict[str, Any], *args: Any, **options: Any) -> list[str]:
    found = {spec.descriptor for spec in specs_from_keras(json.dumps(config), *args, **options)}
    again = {spec.descriptor for spec in specs_from_keras(in_keras_3(config), *args, **options)}
    assert found == again
    return [spec.descriptor for spec in specs_from_keras(config, *args, **options)]


def meant(*texts: str) -> list[str]:
    return [read_specs(text)[0].spec.descriptor for text in texts]


def test_shapes_go_along_the_nodes() -> None:
    assert read(model(BLOCK, ["x"], ["last"])) == meant(*SEEN)


def test_the_order_of_layers_does_not_matter() -> None:
    assert sorted(read(model(BLOCK[::-1], ["x"], ["last"]))) == sorted(meant(*SEEN))


def test_open_sizes_take_the_input_shape() -> None:
    opened = [source(shape=(None, None, None, 3)), *BLOCK[1:]]
    for shape in ((32, 32, 3), (None, 32, 32, 3)):
        assert read(model(opened, ["x"], ["last"]), shape) == meant(*SEEN)
    assert read(model(BLOCK, ["x"], ["last"]), (5, 48, 64, 3))[0] == meant("conv2d n5 ic3 oc8 i48x64 k3x3 p1 nhwc")[0]
    with pytest.raises(SpecError, match="layer c1: input_shape: expected sizes, where only the batch may be None"):
        read(model(opened, ["x"], ["last"]))


def test_a_layer_that_is_called_twice_is_there_twice() -> None:
    shared = layer("Conv2D", "c", [["x"], ["pool"]], **CONV)
    shared["build_config"] = {"input_shape": [None, 32, 32, 8]}  # of the first call
    layers = [source(shape=(None, 32, 32, 8)), shared, layer("MaxPooling2D", "pool", [["x"]], pool_size=[2, 2])]
    assert read(model(layers, ["x"], ["c"])) == meant(
        "conv2d n1 ic8 oc8 i32x32 k3x3 p1 nhwc", "conv2d n1 ic8 oc8 i16x16 k3x3 p1 nhwc"
    )


def test_models_within_models() -> None:
    inner = model(
        [source("y", (None, None, None, 8)), layer("Conv2D", "i", [["y"]], **CONV | {"strides": 2})],
        ["y"],
        ["i"],
        "inner",
    )
    inner |= {"name": "inner", "inbound_nodes": [[["c1", 0, 0, {}]], [["inner", 0, 0, {}]]]}
    layers = [source(), layer("Conv2D", "c1", [["x"]], **CONV), inner, layer("Conv2D", "z", [[("inner", 1)]], **CONV)]
    assert read(model(layers, ["x"], ["z"])) == meant(
        "conv2d n1 ic3 oc8 i32x32 k3x3 p1 nhwc",
        "conv2d n1 ic8 oc8 i32x32 k3x3 s2 p0_1x0_1 nhwc",
        "conv2d n1 ic8 oc8 i16x16 k3x3 s2 p0_1x0_1 nhwc",
        "conv2d n1 ic8 oc8 i8x8 k3x3 p1 nhwc",
    )


def test_several_inputs() -> None:
    layers = [source("x"), source("y", (None, 32, 32, 5)), layer("Concatenate", "both", [["x", "y"]], axis=3)]
    two = model([*layers, layer("Conv2D", "c", [["both"]], **CONV)], ["x", "y"], ["c"])
    assert read(two) == meant("conv2d n1 ic8 oc8 i32x32 k3x3 p1 nhwc")
    with pytest.raises(SpecError, match="layer m: input_shape: expected none for a model of 2 inputs, found one"):
        read(two, (32, 32, 3))


def test_channels_that_contradict_the_layers_before_are_refused() -> None:
    built = layer("Conv2D", "c", [["x"]], **CONV)
    built["build_config"] = {"input_shape": [None, 32, 32, 4]}
    with pytest.raises(SpecError, match="layer c: input_shape: expected 4 channels, as it was built with, found 3"):
        read(model([source(), built], ["x"], ["c"]))
    with pytest.raises(SpecError, match="layer c: input_shape: expected 4 channels, as it was built with, found 5"):
        specs_from_keras(model([source(), built], ["x"], ["c"]), (32, 32, 5))
    (spec,) = specs_from_keras(model([source(), built], ["x"], ["c"]), (48, 48, 4))
    assert (spec.ic, spec.in_spatial) == (4, (48, 48))


def test_nodes_that_go_round_have_no_shapes() -> None:
    layers = [source(), layer("Conv2D", "a", [["b"]], **CONV), layer("Conv2D", "b", [["a"]], **CONV)]
    with pytest.raises(SpecError, match=r"layer [ab]: input_shape: expected build_config\.input_shape, or one given"):
        read(model(layers, ["x"], ["b"]))


def test_what_is_refused_does_not_stop_the_others() -> None:
    strange = layer("Conv2D", "odd", [["x"]], **CONV | {"activation": "softmax"})
    config = model([source(), strange, layer("Conv2D", "c", [["x"]], **CONV)], ["x"], ["c"])
    with pytest.raises(UnsupportedError, match="layer odd: activation: expected"):
        read(config)
    skipped: list[str] = []
    found = specs_from_keras(config, skipped=skipped)
    assert [spec.descriptor for spec in found] == meant("conv2d n1 ic3 oc8 i32x32 k3x3 p1 nhwc")
    assert len(skipped) == 1
    assert skipped[0].startswith("layer odd: activation: expected")


@pytest.mark.parametrize("change", [{"activation": "softmax"}, {"dtype": "float64"}])
def test_what_does_not_change_a_shape_leaves_out_its_layer_alone(change: dict[str, Any]) -> None:
    strange = layer("SeparableConv2D", "odd", [["x"]], **CONV | change, strides=2)
    config = model([source(), strange, layer("Conv2D", "c", [["odd"]], **CONV)], ["x"], ["c"])
    skipped: list[str] = []
    found = specs_from_keras(config, skipped=skipped)
    assert [spec.descriptor for spec in found] == meant("conv2d n1 ic8 oc8 i16x16 k3x3 p1 nhwc")
    assert [reason.split(": expected")[0] for reason in skipped] == [f"layer odd: {next(iter(change))}"]


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where within nested lists and dictionaries something is."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*way, key)
        yield from places(item, (*way, key))


@pytest.mark.parametrize("junk", [None, True, -1, 10**30, 1.5, "x", [], {}, [["x"]], [["x", 0, 0]], {"class_name": 3}])
def test_any_wrong_value_is_an_error_of_ours_or_does_not_matter(junk: Any) -> None:
    for config in (model(BLOCK, ["x"], ["last"]), in_keras_3(model(BLOCK[:3], ["x"], ["pool"]))):
        for way in places(config):
            changed = json.loads(json.dumps(config))
            holder = changed
            for key in way[:-1]:
                holder = holder[key]
            holder[way[-1]] = junk
            with contextlib.suppress(ConvgenError):
                specs_from_keras(changed)


# ---- open sizes -------------------------------------------------------------------------------

OPEN = (None, None, None, 3)


@pytest.mark.parametrize("change", [lambda value: value, in_keras_3], ids=["Keras 2", "Keras 3"])
def test_sizes_by_name_are_those_of_the_input(change: Any, tmp_path: Path) -> None:
    """A file with open sizes and these given is the one that has them, batch too; what is asked for is named."""
    path, whole = tmp_path / "open.json", model([source(shape=(4, 32, 32, 3)), *BLOCK[1:]], ["x"], ["last"])
    path.write_text(json.dumps(change(model([source(shape=OPEN), *BLOCK[1:]], ["x"], ["last"]))))
    dims = {"x[0]": 4, "x[1]": 32, "x[2]": 32}
    found = [entry.spec.descriptor for entry in read_specs(path, dims) for _ in range(entry.count)]
    assert sorted(found) == sorted(read(whole))
    with pytest.raises(SpecError, match=r"only the batch may be None \(as in --dim 'x\[1\]=32'\), found"):
        read_specs(path)
    with pytest.raises(SpecError, match=r"dims: expected names among x\[0\], x\[1\], x\[2\], found 'y\[1\]'"):
        read_specs(path, {"y[1]": 32})
    path.write_text(json.dumps(change(whole)))
    with pytest.raises(SpecError, match=r"dims: expected none, as the model has all sizes, found 'x\[1\]'"):
        read_specs(path, {"x[1]": 32})


def test_sizes_of_each_of_several_inputs(tmp_path: Path) -> None:
    ends = [source("x", OPEN), source("z", (None, 8, None, 3))]
    both = model([*ends, layer("Conv2D", "c", [["x"], ["z"]], **CONV)], ["x", "z"], ["c"])
    (tmp_path / "both.json").write_text(json.dumps(both))
    found = read_specs(tmp_path / "both.json", {"x[1]": 16, "x[2]": 12, "z[2]": 9})
    assert [entry.spec.descriptor for entry in found] == [
        "conv2d n1 ic3 oc8 i16x12 k3x3 s1x1 p1x1 nhwc",
        "conv2d n1 ic3 oc8 i8x9 k3x3 s1x1 p1x1 nhwc",
    ]


def test_a_layer_that_says_its_own_shape(tmp_path: Path) -> None:
    """Without an input layer the axes are those of the layer that states them: Keras 2's first, a serialised one."""
    config = {"name": "first", **CONV, "batch_input_shape": [None, None, 32, 3]}
    first = {"class_name": "Conv2D", "config": config}
    built = {"class_name": "Conv2D", "config": {"name": "first", **CONV}, "build_config": {"input_shape": list(OPEN)}}
    for value in ({"class_name": "Sequential", "config": {"name": "s", "layers": [first]}}, first, built):
        (tmp_path / "one.json").write_text(json.dumps(value))
        sizes = {"first[1]": 40} | ({"first[2]": 32} if value is built else {})
        (entry,) = read_specs(tmp_path / "one.json", sizes)
        assert entry.spec.descriptor == "conv2d n1 ic3 oc8 i40x32 k3x3 s1x1 p1x1 nhwc"
