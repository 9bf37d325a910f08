"""Where specs come from: a descriptor, a file of layers, or an ONNX model.

A TOML, YAML or JSON file holds one layer's fields at its top level, or several layers::

    network = "resnet50"                     # optional, for people
    defaults = { n = 1, activation = "relu" }
    layers = [
        { name = "conv1", ic = 3, oc = 64, in_spatial = [224, 224], kernel = 7, stride = 2, padding = 3 },
        { name = "fc", count = 2, spec = "conv2d n1 ic2048 oc1000 i1x1 k1x1" },
    ]

A layer is fields of :class:`~convgen.spec.ConvSpec`, or ``spec`` with a descriptor; ``name`` (one or
a list) and ``count`` are optional. A JSON file may also be the plain list of layers. A ``.txt`` file
has one descriptor per line and comments from ``#`` on. An unknown or repeated key is an error.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from .errors import SpecError
from .spec import OPERATORS, ConvSpec


@dataclass(frozen=True)
class SpecEntry:
    """A spec, how often it occurs and under which names."""

    spec: ConvSpec
    count: int = 1
    names: tuple[str, ...] = ()


def merge(entries: Iterable[SpecEntry]) -> list[SpecEntry]:
    """One entry per distinct spec, in the order of first occurrence: counts added, names joined."""
    merged: dict[ConvSpec, SpecEntry] = {}
    for entry in entries:
        seen = merged.get(entry.spec, SpecEntry(entry.spec, 0))
        merged[entry.spec] = SpecEntry(entry.spec, seen.count + entry.count, seen.names + entry.names)
    return list(merged.values())


def read_specs(source: str | Path, dims: Mapping[str, int] | None = None) -> list[SpecEntry]:
    """The layers of a descriptor, spec file or ONNX model, identical ones merged.

    Args:
        source: a descriptor, or a path that ends in ``.toml .yaml .yml .json .txt`` or ``.onnx``.
        dims: sizes of an ONNX model's symbolic dimensions, such as ``{"N": 1}``.

    Raises:
        SpecError: the file cannot be read, or a layer is wrong; names file, layer and key.
        UnsupportedError: an ONNX model has a convolution of another dtype or rank.
    """
    descriptor = isinstance(source, str) and not _is_path(source)
    path = Path(source)
    suffix = path.suffix.lower()
    if dims and (descriptor or suffix != ".onnx"):
        raise SpecError("dims", "an ONNX model to use them in", f"{', '.join(dims)} for another source", str(source))
    if descriptor:
        return [SpecEntry(ConvSpec.parse(str(source)))]
    if suffix == ".onnx":
        if not path.is_file():
            read_bytes(path)  # says what is wrong, before onnx is imported
        from .onnx_reader import specs_from_onnx  # onnx is only needed for its own files

        return specs_from_onnx(path, dims)
    if suffix not in _PARSERS:
        expected = f"a file that ends in {', '.join([*_PARSERS, '.onnx'])}"
        raise SpecError("file", expected, f"{suffix or 'no suffix'}" if path.exists() else "no such file", str(path))
    return merge(_entries(_PARSERS[suffix](_read_text(path), str(path)), str(path)))


def dump_specs(entries: Iterable[SpecEntry], path: str | Path) -> None:
    """Write entries as a file that :func:`read_specs` reads back; the suffix gives the format.

    Raises:
        SpecError: the suffix is not one of ``.toml .yaml .yml .json .txt``, or the file cannot be written.
    """
    path, entries = Path(path), list(entries)
    suffix = path.suffix.lower()
    if suffix not in _PARSERS:
        raise SpecError("file", f"a file that ends in {', '.join(_PARSERS)}", suffix or "no suffix", str(path))
    layers = [_layer(entry) for entry in entries]
    if suffix == ".txt":
        text = "".join(f"{entry.spec}\n" * entry.count for entry in entries)
    elif suffix == ".toml":
        tables = (", ".join(f"{key} = {_quoted(value)}" for key, value in layer.items()) for layer in layers)
        text = "layers = [\n" + "".join(f"    {{ {table} }},\n" for table in tables) + "]\n"
    else:  # JSON is YAML, too
        text = '{"layers": [\n' + ",\n".join(map(_quoted, layers)) + "\n]}\n"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SpecError("file", "a file that can be written", error.strerror or error, str(path)) from error


def _layer(entry: SpecEntry) -> dict[str, Any]:
    layer: dict[str, Any] = {}
    if entry.names:
        layer["name"] = entry.names[0] if len(entry.names) == 1 else list(entry.names)
    if entry.count > 1:
        layer["count"] = entry.count
    return layer | {"spec": entry.spec.descriptor}


def _quoted(value: Any) -> str:
    """A value as JSON that is YAML, and in its strings, numbers and lists TOML, as well."""
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(value, ensure_ascii=False))


#: What YAML or TOML do not take inside quotes, or fold into a space.
_UNPRINTABLE = re.compile("[^\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")


def _is_path(text: str) -> bool:
    """Whether text names a file: an existing one, or something that no descriptor looks like."""
    if os.path.exists(text):
        return True
    words = text.split()
    if not words or words[0].lower() in OPERATORS:
        return False
    path = Path(text)
    if path.suffix.lower() in _PARSERS or path.suffix.lower() == ".onnx":
        return True
    return len(words) == 1 and (bool(path.suffix) or any(sep in text for sep in (os.sep, os.altsep) if sep))


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
        SpecError: there is no such file, it is a folder, empty or unreadable.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise SpecError("file", "an existing file", "no such file", str(path)) from None
    except IsADirectoryError:
        raise SpecError("file", "a file", "a directory", str(path)) from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise SpecError("file", "a readable file", reason, repr(str(path))) from error
    if not data.strip():
        raise SpecError("file", "some content", "an empty file", str(path))
    return data


def _read_text(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"byte {error.object[error.start]:#04x} at {error.start}"
        raise SpecError("file", "UTF-8 text", byte, str(path)) from None


# ---- formats: text -> the plain value it spells -----------------------------------------------


def _parse_toml(text: str, where: str) -> Any:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise SpecError("file", "TOML", error, where) from error


def _parse_json(text: str, where: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            keys = [key for key, _ in pairs]
            repeated = next(key for key in values if keys.count(key) > 1)
            raise SpecError(repeated, "each key once", "a repeated key", where)
        return values

    def refuse(word: str) -> NoReturn:
        raise SpecError("file", "JSON numbers", word, where)

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except SpecError:
        raise
    except (ValueError, RecursionError) as error:
        raise SpecError("file", "JSON", error, where) from error


def _parse_yaml(text: str, where: str) -> Any:
    import yaml  # only where there is a YAML file to read

    class Loader(yaml.SafeLoader):
        """The safe loader, which would take the last of several equal keys."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for key in keys:
                if keys.count(key) > 1:
                    raise SpecError(key, "each key once", "a repeated key", where)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except SpecError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SpecError("file", "YAML", " ".join(str(error).split()), where) from error


def _parse_txt(text: str, where: str) -> list[Any]:
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [_Line(number, line) for number, line in enumerate(lines, 1) if line]


@dataclass(frozen=True)
class _Line:
    """A descriptor in a .txt file."""

    number: int
    text: str


_PARSERS: dict[str, Callable[[str, str], Any]] = {
    ".toml": _parse_toml,
    ".yaml": _parse_yaml,
    ".yml": _parse_yaml,
    ".json": _parse_json,
    ".txt": _parse_txt,
}

# ---- the value -> entries ---------------------------------------------------------------------

_FILE_KEYS = ("network", "defaults", "layers")
_LAYER_KEYS = ("name", "count", "spec")


def _entries(value: Any, where: str) -> list[SpecEntry]:
    defaults: Any = {}
    if isinstance(value, Mapping) and "layers" not in value and "defaults" not in value:
        value = dict(value)
        _network(value.pop("network", ""), where)
        return [_entry(value, {}, where)]
    if isinstance(value, Mapping):
        for key in value:
            if key not in _FILE_KEYS:
                raise SpecError(str(key), f"one of {', '.join(_FILE_KEYS)}", "an unknown key", where)
        _network(value.get("network", ""), where)
        defaults, value = value.get("defaults", {}), value.get("layers")
    if not isinstance(defaults, Mapping):
        raise SpecError("defaults", "fields of a layer", repr(defaults), where)
    if not isinstance(value, list) or not value:
        raise SpecError("layers", "a list of layers", "an empty one" if value == [] else repr(value), where)
    return [_entry(layer, defaults, _place(layer, number, where)) for number, layer in enumerate(value, 1)]


def _network(value: object, where: str) -> None:
    if not isinstance(value, str):
        raise SpecError("network", "a string", repr(value), where)


def _place(layer: object, number: int, where: str) -> str:
    if isinstance(layer, _Line):
        return f"{where}: line {layer.number}"
    name = layer.get("name") if isinstance(layer, Mapping) else None
    return f"{where}: layer {number}" + (f" ({name})" if isinstance(name, str) else "")


def _entry(layer: object, defaults: Mapping[str, Any], where: str) -> SpecEntry:
    if isinstance(layer, _Line):
        return SpecEntry(_descriptor(layer.text, where))
    if not isinstance(layer, Mapping):
        raise SpecError("layer", "fields of a layer", repr(layer), where)
    fields = {key: value for key, value in layer.items() if key not in _LAYER_KEYS}
    names, count = layer.get("name", ()), layer.get("count", 1)
    names = (names,) if isinstance(names, str) else names
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise SpecError("name", "a string or a list of strings", repr(names), where)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise SpecError("count", "an integer >= 1", repr(count), where)
    if "spec" not in layer:
        return SpecEntry(ConvSpec.from_dict({**defaults, **fields}, where), count, tuple(names))
    if not isinstance(layer["spec"], str):
        raise SpecError("spec", "a descriptor", repr(layer["spec"]), where)
    if fields or defaults:
        key = next(iter(fields or defaults))
        raise SpecError(str(key), "no other field (nor defaults) beside spec", "one", where)
    return SpecEntry(_descriptor(layer["spec"], where), count, tuple(names))


def _descriptor(text: str, where: str) -> ConvSpec:
    try:
        return ConvSpec.parse(text)
    except SpecError as error:
        raise SpecError(error.field, error.expected, error.found, where) from None
