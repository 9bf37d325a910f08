"""Open sizes of what Keras layers and models take, and configurations in which they are given."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import SpecError

_Config = Mapping[str, Any]


def is_keras(value: Any) -> bool:
    """Whether a JSON value is the configuration of a Keras layer or model."""
    return isinstance(value, Mapping) and "class_name" in value


def with_sizes(config: _Config, dims: Mapping[str, int], where: str = "") -> _Config:
    """The configuration of a layer or model with sizes of its inputs.

    Args:
        config: not changed.
        dims: sizes by axis, the batch's the first: ``{"x[1]": 32}`` of the input layer ``x``, or, where there is no
            input layer, of the layer of that name that states its input's shape.
        where: leads the message of an error.

    Raises:
        SpecError: a name of no axis without a size.
    """
    try:
        changed = copy.deepcopy(config)
    except RecursionError:
        raise SpecError("config", "models nested less deeply", "a deep one", where) from None
    known = dict.fromkeys(open_sizes(changed))
    for name in dims:
        if name not in known:
            found = f"names among {', '.join(known)}" if known else "none, as the model has all sizes"
            raise SpecError("dims", found, repr(name), where)
    for name, shape in _open_shapes(changed):
        for axis, size in enumerate(shape):
            if size is None:
                shape[axis] = dims.get(f"{name}[{axis}]")
    return changed


def open_sizes(config: Any) -> list[str]:
    """The axes of a layer's or model's inputs that have no size: ``x[0]``, ``x[1]``."""
    found = [
        f"{name}[{axis}]" for name, shape in _open_shapes(config) for axis, size in enumerate(shape) if size is None
    ]
    return list(dict.fromkeys(found))


def example(config: Any) -> str:
    """How a message says what would give a size, other than that of a batch; empty where nothing is open."""
    name = next((name for name in open_sizes(config) if not name.endswith("[0]")), "")
    return f" (as in --dim '{name}=32')" if name else ""


def _open_shapes(config: Any) -> list[tuple[str, list[Any]]]:
    """The shapes with open sizes that inputs state, or, without any, all layers; with the layers' names."""
    stated = list(_stated(config))
    inputs = [(name, shape) for kind, name, shape in stated if kind == "InputLayer"]
    return inputs or [(name, shape) for _, name, shape in stated]


def _stated(config: Any) -> Iterator[tuple[str, str, list[Any]]]:
    """Class, name and input shape of each layer that states one with open sizes."""
    waiting = [config]
    while waiting:
        layer = waiting.pop(0)
        if not isinstance(layer, Mapping):
            continue
        inner, built = layer.get("config"), layer.get("build_config")
        layers = inner.get("layers") if isinstance(inner, Mapping) else inner  # Keras 2.1's Sequential is a list
        own = inner if isinstance(inner, Mapping) else {}
        name, kind = layer.get("name") or own.get("name"), layer.get("class_name")
        if isinstance(layers, list):
            waiting += layers
            continue
        for place, key in [(built, "input_shape"), (own, "batch_shape"), (own, "batch_input_shape")]:
            shape = place.get(key) if isinstance(place, Mapping) else None
            if isinstance(name, str) and isinstance(kind, str) and isinstance(shape, list) and None in shape:
                yield kind, name, shape
