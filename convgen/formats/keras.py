"""Layers of Keras: the configuration dictionaries that a layer or model gives of itself.

Keras is not imported: ``layer.get_config()``, ``keras.saving.serialize_keras_object(layer)`` and
``model.to_json()``, of Keras 2 and 3, are plain values. Keys that are not needed are ignored, as
every version adds some; missing ones have Keras's default where there is one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import SpecError, UnsupportedError
from ..problem.activation import Activation
from ..problem.separable import SeparableSpec
from ..problem.spec import ConvSpec
from .entries import SpecEntry
from .keras_sizes import example

_Config = Mapping[str, Any]
_Shape = tuple[Any, ...]  # with the batch and in the layer's data format; None where a size is not known

_CONVOLUTION = re.compile(r"(?:Conv|Convolution)[123]D(?:Transpose)?|(?:Depthwise|Separable)(?:Conv|Convolution)[12]D")
_DTYPES = {
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "mixed_float16": "f16",
    "mixed_bfloat16": "bf16",
}
_LAYOUTS = {"channels_last": "nhwc", "channels_first": "nchw"}

#: Functions of keras.activations.
_ACTIVATIONS = {
    "linear": "none",
    "relu": "relu",
    "relu6": "relu6",
    "leaky_relu": "leaky_relu(0.2)",
    "hard_tanh": "clip(-1,1)",
    "sigmoid": "sigmoid",
    "hard_sigmoid": str(Activation("hardsigmoid", (1 / 6, 0.5))),
    "tanh": "tanh",
    "silu": "silu",
    "swish": "silu",
    "hard_silu": "hardswish",
    "hard_swish": "hardswish",
    "elu": "elu",
    "celu": "elu",  # the same where alpha is 1
    "gelu": "gelu",
    "mish": "mish",
}


def specs_from_keras(
    config: _Config | str,
    input_shape: Sequence[int | None] | None = None,
    *,
    class_name: str = "",
    accuracy: str = "standard",
    skipped: list[str] | None = None,
) -> list[ConvSpec]:
    """The convolutions of a Keras layer or model, in its order.

    ``Conv1D…3D``, ``Conv1DTranspose…``, ``DepthwiseConv1D/2D`` (whose groups are the input channels)
    and ``SeparableConv1D/2D``, as its depthwise part without bias and its pointwise part with bias and
    activation. Other layers of a model are passed over. Of a functional model shapes go from layer to layer
    as its nodes say; a layer or model that several nodes call is there once for each. A spec's weights are
    Keras's kernel ``[*k, ic/groups, oc]`` as ``[oc, ic/groups, *k]``, transposed ``[*k, oc, ic]`` as
    ``[ic, oc, *k]``, depthwise ``[*k, ic, multiplier]`` as ``[ic * multiplier, 1, *k]``.

    Args:
        config: a layer or model as ``serialize_keras_object`` or ``to_json`` give it, as a dictionary
            or as JSON text; or a ``get_config()``, with ``class_name``.
        input_shape: of the layer, or of a model with one input, in its data format; without a batch, or
            with ``None`` for it, ``n`` is 1. Else what the configuration says of itself counts.
        class_name: of the layer, such as ``"Conv2D"``, where ``config`` does not have it.
        accuracy: as in :class:`ConvSpec`.
        skipped: where given, a convolution of a model that is refused is left out, and the reason
            appended here.

    A mixed dtype policy gives the dtype it computes in. ``hard_sigmoid`` is Keras 3's unless the
    configuration has a ``keras_version`` below 3, as ``to_json`` of Keras 2 writes.

    Raises:
        SpecError: a key is missing or wrong, or a shape is not known; names the layer.
        UnsupportedError: an activation, dtype or wrapper that a spec cannot say; names the layer.
    """
    return [entry.spec for entry in _read(config, input_shape, class_name, accuracy, skipped).entries]


def entries_from_keras(config: _Config, *, skipped: list[str] | None = None) -> list[SpecEntry]:
    """The convolutions of a Keras layer or model with Keras's names of their layers; see :func:`specs_from_keras`."""
    return _read(config, None, "", "standard", skipped).entries


def separables_from_keras(
    config: _Config | str, input_shape: Sequence[int | None] | None = None, *, class_name: str = ""
) -> list[SeparableSpec]:
    """The layers ``SeparableConv1D/2D`` of a Keras layer or model, each as one problem; none where there is none.

    Its parameters are those of the two parts of :func:`specs_from_keras`, whose arguments these are. Convolutions of a
    model that are refused are passed over.

    Raises:
        SpecError, UnsupportedError: of a layer, as :func:`specs_from_keras`.
    """
    return _read(config, input_shape, class_name, "standard", []).separables


def _read(
    config: _Config | str,
    input_shape: Sequence[int | None] | None,
    class_name: str,
    accuracy: str,
    skipped: list[str] | None,
) -> _Reader:
    """All that is read of a layer or model."""
    layer = _parse(config) if isinstance(config, str) else config
    if class_name and isinstance(layer, Mapping):
        layer = {**(layer if "config" in layer else {"config": layer}), "class_name": class_name}
    is_model = _layers(layer) is not None
    if not is_model and not _CONVOLUTION.fullmatch(_class(layer)):
        raise SpecError("class_name", "a convolution, or a model of layers", _class(layer), _name(layer))
    given = input_shape is not None
    reader = _Reader(accuracy, _version(layer), [], given, skipped if is_model else None)
    reader.hint = "" if given else example(layer)
    try:
        reader.read(layer, [None if input_shape is None else _sizes(input_shape)])
    except RecursionError:
        raise SpecError("config", "models nested less deeply", "a deep one") from None
    return reader


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SpecError("config", "a dictionary or JSON", error) from error


# ---- a configuration's parts ------------------------------------------------------------------


def _class(layer: Any) -> str:
    if not isinstance(layer, Mapping):
        raise SpecError("config", "the dictionary of a layer", repr(layer))
    name = layer.get("class_name")
    if not isinstance(name, str):
        raise SpecError("class_name", "the class of the layer", repr(name), _name(layer))
    return name


def _config(layer: _Config) -> _Config:
    config = layer.get("config")
    if not isinstance(config, Mapping):
        raise SpecError("config", "the dictionary of a layer", repr(config), _name(layer))
    return config


def _name(layer: _Config) -> str:
    """How messages name a layer."""
    config = layer.get("config", layer)
    name = config.get("name") if isinstance(config, Mapping) else None
    return f"layer {name}" if isinstance(name, str) else f"layer of class {layer.get('class_name')}"


def _layers(layer: _Config) -> list[Any] | None:
    """The layers of a model; None for a layer."""
    config = layer.get("config") if isinstance(layer, Mapping) else None
    layers = config.get("layers") if isinstance(config, Mapping) else config  # Keras 2.1's Sequential is a list
    return layers if isinstance(layers, list) else None


def _version(layer: Any) -> int:
    """Keras's major version."""
    text = layer.get("keras_version") if isinstance(layer, Mapping) else None
    return int(text[0]) if isinstance(text, str) and text[:1].isdecimal() else 3


def _sizes(value: Any) -> _Shape:
    if not _is_shape(value):
        raise SpecError("input_shape", "a list of sizes", repr(value))
    return tuple(value)


def _is_shape(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(size is None or hasattr(size, "__index__") for size in value)
    )


def _stated(layer: _Config) -> _Shape | None:
    """The input shape that the configuration of a layer or Sequential model states."""
    config, built = layer.get("config"), layer.get("build_config")
    places = [(built, "input_shape"), (config, "batch_shape"), (config, "batch_input_shape")]
    for place, key in [*places, (config, "build_input_shape")]:
        if isinstance(place, Mapping) and _is_shape(place.get(key)):
            return tuple(place[key])
    return None


def _with_batch(shape: _Shape, rank: int, where: str) -> _Shape:
    if len(shape) not in (rank + 1, rank + 2):
        raise SpecError("input_shape", f"{rank + 2} sizes, or {rank + 1} without the batch", list(shape), where)
    return shape if len(shape) == rank + 2 else (None, *shape)


def _rank(class_name: str) -> int:
    """The number of spatial axes that a layer's name states: 2 for ``Conv2D``."""
    (digit,) = re.findall(r"([123])D", class_name)
    return int(digit)


def _word(config: _Config, key: str, default: str, known: Sequence[str], where: str) -> str:
    value = config.get(key) or default
    if not isinstance(value, str) or value.lower() not in known:
        raise SpecError(key, f"one of {', '.join(known)}", repr(value), where)
    return value.lower()


def _layout(config: _Config, where: str) -> str:
    return _LAYOUTS[_word(config, "data_format", "channels_last", tuple(_LAYOUTS), where)]


def _axes(config: _Config, key: str, default: Any, rank: int, where: str, *, minimum: int = 1) -> tuple[int, ...]:
    """One integer for all axes, or one per axis."""
    value = config.get(key)
    value = default if value is None else value
    values = [value] * rank if isinstance(value, int) else value
    if not isinstance(values, Sequence) or len(values) != rank or not all(type(v) is int for v in values):
        raise SpecError(key, f"an integer, or {rank} of them", "none" if value is None else repr(value), where)
    if min(values) < minimum:
        raise SpecError(key, f"at least {minimum}", repr(value), where)
    return tuple(values)


def _dtype(value: Any, where: str) -> str:
    """The dtype computed in: a name, or a policy object with one."""
    inner = value.get("config") if isinstance(value, Mapping) else None
    name = inner.get("name") if isinstance(inner, Mapping) else value
    if name is None:
        return "f32"
    if not isinstance(name, str) or name not in _DTYPES:
        raise UnsupportedError(f"{where}: dtype: expected one of {', '.join(_DTYPES)}, found {name!r}")
    return _DTYPES[name]


def _activation(value: Any, version: int, where: str) -> str:
    """A spec's activation from a name, a function object or a layer object."""
    if value is None:
        return "none"
    if isinstance(value, Mapping) and isinstance(value.get("config"), Mapping):
        return _activation_layer(_class(value), value["config"], version, where)
    name = value.get("config") if isinstance(value, Mapping) else value
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise UnsupportedError(f"{where}: activation: expected one of {', '.join(_ACTIVATIONS)}, found {name!r}")
    if name == "hard_sigmoid" and version < 3:
        return "hardsigmoid(0.2,0.5)"
    return _ACTIVATIONS[name]


def _activation_layer(name: str, config: _Config, version: int, where: str) -> str:
    def number(*keys: str, default: float) -> float:
        value = next((config[key] for key in keys if config.get(key) is not None), default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise SpecError(keys[0], "a number", repr(value), where)
        return float(value)

    if name == "Activation":
        return _activation(config.get("activation"), version, where)
    if name == "LeakyReLU":
        return str(Activation("leaky_relu", (number("negative_slope", "alpha", default=0.3),)))
    if name == "ELU":
        return str(Activation("elu", (number("alpha", default=1.0),)))
    if name == "ReLU" and not number("threshold", default=0):
        slope, top = number("negative_slope", default=0), number("max_value", default=float("inf"))
        if top == float("inf"):
            return str(Activation("leaky_relu", (slope,))) if slope else "relu"
        if not slope:
            return str(Activation("clip", (0.0, top)))
    raise UnsupportedError(f"{where}: activation: expected Activation, ELU, LeakyReLU or a plain ReLU, found {name}")


# ---- the nodes of functional models -----------------------------------------------------------

#: A tensor of a functional model: the layer that makes it, which of its calls, and which of their outputs.
_Call = tuple[str, int, int]


def _key(layer: Any) -> str:
    """A layer's name, which nodes refer to."""
    if not isinstance(layer, Mapping):
        return ""
    config = layer.get("config")
    name = layer.get("name") or (config.get("name") if isinstance(config, Mapping) else None)
    return name if isinstance(name, str) else ""


def _nodes(layer: Any) -> list[list[_Call]]:
    """The tensors that each call of a layer takes; one call of nothing where it is not said.

    Keras 2 has a list of ``[name, call, output, arguments]`` for each call, Keras 3 a dictionary with ``args``, in
    which a tensor is an object of class ``__keras_tensor__`` with ``keras_history``.
    """
    nodes = layer.get("inbound_nodes") if isinstance(layer, Mapping) else None
    return [_calls(node) for node in nodes] if isinstance(nodes, list) and nodes else [[]]


def _calls(value: Any) -> list[_Call]:
    """The tensors within a node or a list of them, in order."""
    if isinstance(value, Mapping):
        config = value.get("config")
        if value.get("class_name") == "__keras_tensor__" and isinstance(config, Mapping):
            return _calls(config.get("keras_history"))
        return [call for item in value.values() for call in _calls(item)]
    if not isinstance(value, list | tuple):
        return []
    if len(value) >= 3 and isinstance(value[0], str) and all(type(number) is int for number in value[1:3]):
        return [(value[0], value[1], value[2]), *_calls(value[3:])]
    return [call for item in value for call in _calls(item)]


def _more_exact(shape: _Shape | None, stated: _Shape | None) -> _Shape | None:
    """What is known of a shape: the sizes that the layers before give, and where they leave them open those that a
    layer states, which are those of the first of its calls.
    """
    if shape is None or stated is None or len(shape) != len(stated):
        return shape or stated
    return tuple(said if found is None else found for found, said in zip(shape, stated, strict=True))


def _reshaped(shape: _Shape, target: Any) -> _Shape | None:
    """The shape after a Reshape to ``target``, of which one size may be -1; None where it is not known."""
    if not _is_shape(target) or None in target or None in shape[1:]:
        return None
    total, known = math.prod(shape[1:]), math.prod(size for size in target if size != -1)
    if -1 not in target or not known:
        return (shape[0], *target)
    return (shape[0], *(total // known if size == -1 else size for size in target))


def _merged(name: str, config: _Config, shapes: Sequence[_Shape | None]) -> _Shape | None:
    """The shape after a layer of several inputs: Keras's merging layers; None where it is not known."""
    first = shapes[0]
    if first is None or any(shape is None or len(shape) != len(first) for shape in shapes):
        return None
    sizes = [[shape[axis] for shape in shapes if shape is not None] for axis in range(len(first))]
    if name == "Concatenate":
        axis = config.get("axis", -1)
        if type(axis) is not int or not -len(first) <= axis < len(first):
            return None
        axis %= len(first)
        total = None if None in sizes[axis] else sum(sizes[axis])
        return (*first[:axis], total, *first[axis + 1 :])
    if name not in ("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum"):
        return None
    # Axes of one element stand for as many as the others have.
    return tuple(None if None in axis else max(axis) for axis in sizes)


# ---- layers and models ------------------------------------------------------------------------

_RESIZING = re.compile(r"(MaxPooling|AveragePooling|ZeroPadding|Cropping|UpSampling)[123]D")

_GLOBAL = re.compile("Global(Max|Average)Pooling[123]D")
#: Layers whose output has the shape of their input.
_KEEPING = re.compile(
    "InputLayer|Activation|ReLU|LeakyReLU|PReLU|ELU|Softmax|Identity|Rescaling|(|Batch|Layer|Group|Unit)Normalization|"
    "(|Alpha|Gaussian)Dropout|SpatialDropout[123]D|GaussianNoise|ActivityRegularization"
)


@dataclass
class _Reader:
    """Collects the convolutions of nested layers.

    ``given``: the input's shape is the caller's, so what layers say of theirs does not count. ``separables``: those of
    f32, whose two parts are among the ``entries``. ``hint``: how to give a size that is open.
    """

    accuracy: str
    version: int
    entries: list[SpecEntry]
    given: bool
    skipped: list[str] | None
    separables: list[SeparableSpec] = field(default_factory=list)
    hint: str = ""

    def read(self, layer: _Config, shapes: Sequence[_Shape | None]) -> list[_Shape | None]:
        """Add the convolutions of a layer or model that is fed ``shapes``; the shapes after it. None: not known."""
        name, where, layers = _class(layer), _name(layer), _layers(layer)
        if layers is not None and name != "Sequential":
            return self._graph(_config(layer), layers, shapes, where)
        shape = shapes[0] if shapes else None
        if not self.given:
            shape = _more_exact(shape, _stated(layer))
        if layers is not None:
            for inner in layers:
                (shape,) = self.read(inner, [shape])[:1] or (None,)
            return [shape]
        config = _config(layer)
        if _CONVOLUTION.fullmatch(name):
            return [self._kept(layer, name, shape, where)]
        if _has_convolution(config.get("layer")):
            self._refuse(UnsupportedError(f"{where}: expected no convolution within a {name}"))
            return [None]
        if len(shapes) > 1:
            return [_merged(name, config, shapes)]
        return [None if shape is None else _after(name, config, shape, where)]

    def _kept(self, layer: _Config, name: str, shape: _Shape | None, where: str) -> _Shape | None:
        """Add a convolution, or the reason why it is left out; the shape after it, which dtype and activation do not
        change.
        """
        config = _config(layer)
        try:
            _check_origin(layer, where)
            if shape is None:
                raise SpecError("input_shape", "build_config.input_shape, or one given", "none", where)
            shape = _with_batch(shape, _rank(name), where)
            _check_channels(layer, shape, where)
            specs = self._specs(name, config, shape, where)
        except (SpecError, UnsupportedError) as error:
            self._refuse(error)
            return None
        try:
            self._add(specs, config, where)
        except (SpecError, UnsupportedError) as error:
            self._refuse(error)
        return specs[-1].dst_shape

    def _refuse(self, error: SpecError | UnsupportedError) -> None:
        if self.skipped is None:
            raise error
        self.skipped.append(str(error))

    def _graph(
        self, config: _Config, layers: list[Any], shapes: Sequence[_Shape | None], where: str
    ) -> list[_Shape | None]:
        """A functional model: every call of its layers, as soon as the shapes of its inputs are known."""
        inputs, outputs = (_calls(config.get(f"{end}_layers")) for end in ("input", "output"))
        if self.given and len(inputs) != len(shapes):
            raise SpecError("input_shape", f"none for a model of {len(inputs)} inputs", "one", where)
        if not inputs:  # a class of the user's, whose configuration says no more than its layers
            for inner in layers:
                self.read(inner, [None])
            return [None]
        fed = {call: shape for call, shape in zip(inputs, shapes, strict=False) if shape is not None}
        known: dict[_Call, _Shape | None] = {}
        # In the order of the file, as Keras writes it: calls wait for those before them.
        waiting = [
            ((_key(inner), node, 0), inner, calls) for inner in layers for node, calls in enumerate(_nodes(inner))
        ]
        while waiting:
            ready = [item for item in waiting if all(call in known for call in item[2])]
            for place, inner, calls in ready or waiting[:1]:  # of a cycle, or a call of nothing: shapes are not known
                before = [known.get(call) for call in calls] or [fed.get(place)]
                found = self.read(inner, before) or [None]
                known.update({(place[0], place[1], number): shape for number, shape in enumerate(found)})
                waiting.remove((place, inner, calls))
        return [known.get(call) for call in outputs]

    def _specs(self, name: str, config: _Config, shape: _Shape, where: str) -> list[ConvSpec]:
        """A convolution, or the two of a separable one, of f32 and without activation."""
        rank, layout = _rank(name), _layout(config, where)
        n, ic, *in_spatial = shape if layout == "nchw" else (shape[0], shape[-1], *shape[1:-1])
        if None in (ic, *in_spatial):
            expected = f"sizes, where only the batch may be None{self.hint}"
            raise SpecError("input_shape", expected, list(shape), where)
        fields: dict[str, Any] = {
            "n": 1 if n is None else n,
            "ic": ic,
            "in_spatial": in_spatial,
            "kernel": _axes(config, "kernel_size", None, rank, where),
            "stride": _axes(config, "strides", 1, rank, where),
            "dilation": _axes(config, "dilation_rate", 1, rank, where),
        }
        common, bias = {"layout": layout, "accuracy": self.accuracy}, {"bias": config.get("use_bias", True)}
        fields |= common | _padding(name, config, fields, where)

        if name.startswith(("Depthwise", "Separable")):
            (multiplier,) = _axes(config, "depth_multiplier", 1, 1, where)
            fields |= {"oc": ic * multiplier, "groups": ic}
        else:
            (filters,) = _axes(config, "filters", None, 1, where)
            fields |= {"oc": filters, "groups": config.get("groups", 1), "transposed": name.endswith("Transpose")}
        if not name.startswith("Separable"):
            return [ConvSpec.from_dict(fields | bias, where)]
        (filters,) = _axes(config, "filters", None, 1, where)
        depthwise = ConvSpec.from_dict(fields | {"bias": False}, where)
        point = {"n": depthwise.n, "ic": depthwise.oc, "oc": filters, "in_spatial": depthwise.out_spatial}
        return [depthwise, ConvSpec.from_dict(point | common | bias | {"kernel": (1,) * rank}, where)]

    def _add(self, specs: Sequence[ConvSpec], config: _Config, where: str) -> None:
        """Keep the parts of a layer with its dtype and activation."""
        dtype = _dtype(config.get("dtype"), where)
        *before, last = (spec.with_(dtype=dtype) for spec in specs)
        last = last.with_(activation=_activation(config.get("activation"), self.version, where))
        if before and dtype == "f32":
            self.separables.append(SeparableSpec(before[0], last))
        named = config.get("name")
        names = (named,) if isinstance(named, str) else ()
        self.entries += [SpecEntry(spec, names=names) for spec in (*before, last)]


def _check_origin(layer: _Config, where: str) -> None:
    """Refuse a class of the user's that has the name of Keras's."""
    module = layer.get("module")
    if isinstance(module, str) and module.partition(".")[0] not in ("keras", "tf_keras", "tensorflow"):
        raise UnsupportedError(f"{where}: module: expected a layer of Keras, found {module}")


def _check_channels(layer: _Config, shape: _Shape, where: str) -> None:
    """Refuse a shape that the layers before give where this one was built, and has weights, for other channels."""
    stated, axis = _stated(layer), 1 if _layout(_config(layer), where) == "nchw" else -1
    if stated is None or len(stated) != len(shape) or None in (stated[axis], shape[axis]):
        return
    if stated[axis] != shape[axis]:
        raise SpecError("input_shape", f"{stated[axis]} channels, as it was built with", shape[axis], where)


def _has_convolution(layer: Any) -> bool:
    if not isinstance(layer, Mapping):
        return False
    if _CONVOLUTION.fullmatch(_class(layer)):
        return True
    return any(map(_has_convolution, _layers(layer) or [_config(layer).get("layer")]))


def _padding(name: str, config: _Config, fields: _Config, where: str) -> dict[str, Any]:
    """Fields of ConvSpec for ``padding``, given its sizes.

    A transposed convolution is the gradient of one whose padding is computed from the output's size,
    which is that of Keras's ``compute_conv_transpose_output_shape``; the smaller half is cropped first.
    """
    axes = list(zip(*(fields[key] for key in ("in_spatial", "kernel", "stride", "dilation")), strict=True))
    rank, windows = len(axes), [(kernel - 1) * dilation + 1 for _, kernel, _, dilation in axes]
    if not name.endswith("Transpose"):
        causal = ("causal",) if rank == 1 else ()
        word = _word(config, "padding", "valid", ("valid", "same", *causal), where)
        return {"padding": [(windows[0] - 1, 0)] if word == "causal" else word}

    same = _word(config, "padding", "valid", ("valid", "same"), where) == "same"
    extras: Sequence[int | None] = (None,) * rank
    if config.get("output_padding") is not None:
        extras = _axes(config, "output_padding", None, rank, where, minimum=0)
    sizes = []
    for (size, _, stride, _), window, extra in zip(axes, windows, extras, strict=True):
        if extra is None:
            reach = stride if same else max(window, stride)
        elif extra < stride:
            reach = extra + (window % 2 if same else window)
        else:
            raise SpecError("output_padding", f"less than strides = {stride}", extra, where)
        sizes.append((size - 1) * stride + reach)
    return {"padding": "same", "output_spatial": sizes}


def _after(name: str, config: _Config, shape: _Shape, where: str) -> _Shape | None:
    """The shape after a layer that is no convolution; None where that is not known."""
    if _KEEPING.fullmatch(name):
        return shape
    if name == "Reshape":
        return _reshaped(shape, config.get("target_shape"))
    if _GLOBAL.fullmatch(name):
        rank, last = _rank(name), _layout(config, where) == "nhwc"
        batch, *rest = _with_batch(shape, rank, where)
        ones = (1,) * rank * bool(config.get("keepdims"))
        return (batch, *ones, rest[-1]) if last else (batch, rest[0], *ones)
    if not _RESIZING.fullmatch(name):
        return None
    rank = _rank(name)
    shape, kind = _with_batch(shape, rank, where), name[:-2]
    first = 2 if _layout(config, where) == "nchw" else 1
    spatial = shape[first : first + rank]
    if kind == "UpSampling":
        factors = _axes(config, "size", 2, rank, where)
        sizes = [size and size * factor for size, factor in zip(spatial, factors, strict=True)]
    elif kind.endswith("Pooling"):
        windows = _axes(config, "pool_size", 2, rank, where)
        strides = _axes(config, "strides", windows, rank, where)
        if _word(config, "padding", "valid", ("valid", "same"), where) == "same":
            windows = (1,) * rank
        sizes = [size and (size - w) // s + 1 for size, w, s in zip(spatial, windows, strides, strict=True)]
    else:
        sign, key = (1, "padding") if kind == "ZeroPadding" else (-1, "cropping")
        pairs = [config.get(key)] if rank == 1 else config.get(key)
        if not isinstance(pairs, Sequence) or len(pairs) != rank:
            raise SpecError(key, f"{rank} (begin, end) pairs", repr(pairs), where)
        amounts = [sum(_axes({key: pair}, key, None, 2, where, minimum=0)) for pair in pairs]
        sizes = [size and size + sign * amount for size, amount in zip(spatial, amounts, strict=True)]
    return (*shape[:first], *sizes, *shape[first + rank :])
