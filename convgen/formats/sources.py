"""Where specs come from, and how they are written: one line each, a file of layers, or a model.

A TOML, YAML or JSON file holds one layer's fields at its top level, or several layers::

    network = "resnet50"                     # optional, for people
    defaults = { n = 1, activation = "relu" }      # of layers that are fields; there is no "spec" beside them
    layers = [
        { name = "conv1", ic = 3, oc = 64, in_spatial = [224, 224], kernel = 7, stride = 2, padding = 3 },
        { name = "fc", count = 2, ic = 2048, oc = 1000, in_spatial = [1, 1], kernel = 1, activation = "identity" },
    ]

A layer is fields of :class:`~convgen.problem.spec.ConvSpec`, or ``spec`` with a descriptor; ``name`` (one or
a list) and ``count`` are optional. A JSON file may also be the plain list of layers, or what Keras
says of a layer or model (:mod:`convgen.formats.keras`). An unknown or repeated key is an error.

An ONNX model is known by its suffix or its content; other kinds of models are refused by name
(:mod:`convgen.formats.foreign`). Any other file is text, whatever its suffix: each line a descriptor,
problems and options of oneDNN's benchdnn or what it printed of them (:mod:`convgen.formats.benchdnn`),
a line that oneDNN printed (:mod:`convgen.formats.onednn`) or a MIOpenDriver command
(:mod:`convgen.formats.miopen`); a comment goes from a ``#`` at its beginning or after a space to the
end of the line. A ``.log`` file has other lines as well, which are passed over.
"""

from __future__ import annotations

import json
import math
import os
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from ..errors import SpecError, UnsupportedError, meant
from ..folders import replacing
from ..problem.separable import SEPARABLE
from ..problem.spec import OPERATORS, ConvSpec
from . import benchdnn, miopen, onednn
from .entries import SpecEntry, merge
from .foreign import foreign, is_onnx, missing
from .keras_sizes import is_keras, with_sizes
from .onnx.reader import specs_from_onnx

#: Takes a line and its place; gives its layers, how often each occurs and its names, or errors instead.
Reader = Callable[[str, str], Iterable[benchdnn.Outcome]]


@dataclass(frozen=True)
class Form:
    """A notation in lines.

    ``recognise``: whether a line is meant as one of it. ``reader``: what reads the lines of a file
    (None: a line alone) in order. ``write``: the lines of an entry; None where it is only read.
    """

    recognise: Callable[[str], bool]
    reader: Callable[[Path | None], Reader]
    write: Callable[[SpecEntry], str] | None = None


def _each(parse: Callable[[str, str], Sequence[ConvSpec]]) -> Callable[[Path | None], Reader]:
    """The reader of a notation in which every line can be read without the others, and may be several layers."""

    def read(line: str, where: str) -> Iterable[benchdnn.Outcome]:
        try:
            return [(spec, 1, ()) for spec in parse(line, where)]
        except (SpecError, UnsupportedError) as error:
            return [error]

    return lambda path: read


def _descriptor(text: str, where: str) -> list[ConvSpec]:
    try:
        return [ConvSpec.parse(text)]
    except SpecError as error:
        raise SpecError(error.field, error.expected, error.found, where) from None


def _repeated(write: Callable[[ConvSpec], str]) -> Callable[[SpecEntry], str]:
    """The writer of a notation that has neither names nor counts."""
    return lambda entry: f"{write(entry.spec)}\n" * entry.count


#: Notations in lines.
LINES = {
    "descriptors": Form(
        lambda line: line.split()[0].lower() in OPERATORS, _each(_descriptor), _repeated(ConvSpec.__str__)
    ),
    "benchdnn": Form(
        benchdnn.recognise,
        lambda path: benchdnn.Reader(_lines_of, path).read,
        lambda entry: benchdnn.write(entry.spec, entry.count, entry.names) + "\n",
    ),
    "miopen": Form(miopen.recognise, _each(miopen.parse_all), _repeated(miopen.write)),
    "onednn": Form(onednn.recognise, lambda path: onednn.parse),
}
#: Those that layers are written in.
_WRITTEN = {name: form.write for name, form in LINES.items() if form.write is not None}
#: Most values of a YAML file. A few hundred bytes of aliases can stand for more than any memory holds.
_MOST_VALUES = 1_000_000
#: A number in a YAML file; ``.inf`` is an activation's bound.
_NUMBER = re.compile(
    r"[-+]?(0|[1-9]\d*)(\.\d*)?([eE][-+]?\d+)?|[-+]?\.\d+([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
#: How layers are written.
FORMS = (*_WRITTEN, "toml", "yaml", "json")
#: What symbolic dimensions' sizes are for.
_SIZED = "an ONNX model to use them in, or the JSON of a Keras model"
#: A file's suffix -> its form.
SUFFIXES = {".toml": "toml", ".yaml": "yaml", ".yml": "yaml", ".json": "json", ".txt": "descriptors"}


def read_specs(
    source: str | Path, dims: Mapping[str, int] | None = None, skipped: list[str] | None = None
) -> list[SpecEntry]:
    """The layers of a line, file or ONNX model, identical ones merged.

    Args:
        source: a descriptor, benchdnn problem or MIOpenDriver command, or the path of a file.
        dims: sizes of an ONNX model's symbolic dimensions, such as ``{"N": 1}``, or of axes of a Keras model's inputs.
        skipped: where given, one of several layers that is wrong, or beyond this version as a backward
            pass is, is left out, and the reason appended here.

    Raises:
        SpecError: the file cannot be read, or a layer is wrong; names file, line or layer, and field.
        UnsupportedError: a layer is of a kind, dtype or rank that this version does not serve.
    """
    path = Path(source)
    if is_model(source):
        return specs_from_onnx(path, dims, skipped)
    if dims and not _is_keras(path):
        raise SpecError("dims", _SIZED, f"{', '.join(dims)} for another source", str(source))
    if not is_path(source):
        return _read_lines([("", str(source).strip())], None, skipped)
    suffix = path.suffix.lower()
    if suffix in _PARSERS:
        value = _PARSERS[suffix](_read_text(path), str(path))
        return merge(_entries(with_sizes(value, dims, str(path)) if dims else value, str(path), skipped))
    return _read_lines(_lines_of(path), path, skipped)


def format_specs(entries: Iterable[SpecEntry], form: str, skipped: list[str] | None = None) -> str:
    """The text of entries in one of :data:`FORMS`; :func:`read_specs` gives them back.

    Descriptors and MIOpenDriver commands have no names, and a line for each time a layer occurs.

    Args:
        entries: the layers.
        form: one of :data:`FORMS`.
        skipped: where given, a layer that the form cannot say is left out, and the reason appended here.

    Raises:
        UnsupportedError: the form cannot say a layer; names layer and field.
    """
    if form == "toml":
        tables = (
            ", ".join(f"{key} = {_quoted(value, form)}" for key, value in _layer(entry).items()) for entry in entries
        )
        return "layers = [\n" + "".join(f"    {{ {table} }},\n" for table in tables) + "]\n"
    if form not in _WRITTEN:  # JSON is YAML, too
        return '{"layers": [\n' + ",\n".join(_quoted(_layer(entry), form) for entry in entries) + "\n]}\n"
    lines = []
    for number, entry in enumerate(entries, 1):
        where = f"layer {number}" + (f" ({entry.names[0]})" if entry.names else "")
        if entry.count > benchdnn.LIMIT:
            raise SpecError("count", f"at most {benchdnn.LIMIT} of a layer in lines", entry.count, where)
        try:
            lines.append(_WRITTEN[form](entry))
        except UnsupportedError as error:
            reason = f"{where}: {error}"
            if skipped is None:
                raise UnsupportedError(reason) from None
            skipped.append(reason)
    return "".join(lines)


def dump_specs(entries: Iterable[SpecEntry], path: str | Path) -> None:
    """Write entries as a file that :func:`read_specs` reads back; the suffix gives the form.

    Raises:
        SpecError: the suffix is none of :data:`SUFFIXES`, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        expected = f"a file that ends in {', '.join(SUFFIXES)}"
        raise SpecError("file", expected, path.suffix or "no suffix", str(path))
    text = format_specs(entries, SUFFIXES[path.suffix.lower()])
    try:
        write_text(text, path)
    except OSError as error:
        raise SpecError("file", "a file that can be written", error.strerror or error, str(path)) from error


def write_text(text: str, path: Path) -> None:
    """Write a file so that there is the old one or the whole new one, whatever happens meanwhile.

    Raises:
        OSError: it cannot be written.
    """
    try:
        with replacing(path) as new:
            new.write_text(text, encoding="utf-8")
    except OSError as error:
        error.filename = str(path)
        raise


def _layer(entry: SpecEntry) -> dict[str, Any]:
    layer: dict[str, Any] = {}
    if entry.names:
        layer["name"] = entry.names[0] if len(entry.names) == 1 else list(entry.names)
    if entry.count > 1:
        layer["count"] = entry.count
    return layer | {"spec": entry.spec.descriptor}


def _quoted(value: Any, form: str) -> str:
    """A value as JSON that is YAML, and in its strings, numbers and lists TOML, as well.

    What does not print is escaped: there is nothing in the file that an editor or a terminal does not show.
    """
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else "".join(c if c.isprintable() else _escape(c, form) for c in text)


def _escape(character: str, form: str) -> str:
    """A character inside quotes: beyond the first 65,536, JSON alone has two escapes for one."""
    if ord(character) > 0xFFFF and form != "json":
        return f"\\U{ord(character):08x}"
    return json.dumps(character)[1:-1] if ord(character) > 0xFFFF else f"\\u{ord(character):04x}"


# ---- what a source is -------------------------------------------------------------------------


def is_path(source: str | Path, folder: Path = Path()) -> bool:
    """Whether a source is a file's name: of an existing one, or something that no line looks like.

    Args:
        source: as :func:`read_specs` takes it.
        folder: what a relative name is relative to.
    """
    # Unlike a path's own method it raises nothing, whatever text this is.
    if isinstance(source, Path) or (source and os.path.exists(folder / source)):
        return True
    if not source.strip() or any(form.recognise(source) for form in LINES.values()):
        return False
    named = bool(Path(source).suffix) or any(sep in source for sep in (os.sep, os.altsep) if sep)
    return _is_named(source) or (len(source.split()) == 1 and named)


def is_model(source: str | Path, folder: Path = Path()) -> bool:
    """Whether a source is the file of an ONNX model: by its suffix, or by its content where the suffix says nothing.

    Args:
        source: as :func:`read_specs` takes it.
        folder: what a relative name is relative to.

    Raises:
        SpecError: it is a file of another kind, which is not read; names that, and the way from there.
    """
    path = folder / source
    suffix = path.suffix.lower()
    if not is_path(source, folder) or suffix in _PARSERS:
        return False
    if suffix == ".onnx" or not path.is_file():
        return suffix == ".onnx"
    try:
        found = foreign(path)
        if found is None:
            return is_onnx(path)
    except OSError:  # reading it says why
        return False
    what, way = found
    raise SpecError("file", "layers or an ONNX model", f"{what}: {way}", str(path))


def sizes_for(
    sources: Sequence[str], dims: Mapping[str, int] | None, folder: Path = Path()
) -> list[Mapping[str, int] | None]:
    """What sizes of symbolic dimensions are for each of several sources: those of all models are given together.

    Raises:
        SpecError: there are sizes, and none of the sources is a model that takes any.
    """
    if not dims:
        return [None] * len(sources)
    sizes = [dims if is_model(source, folder) or _is_keras(folder / source) else None for source in sources]
    if not any(sizes):
        raise SpecError("dims", _SIZED, f"{', '.join(dims)} for {', '.join(sources) or 'no source'}")
    return sizes


def _is_keras(path: Path) -> bool:
    """Whether a file is the configuration of a Keras layer or model."""
    return path.suffix.lower() == ".json" and path.is_file() and is_keras(_parse_json(_read_text(path), str(path)))


def _is_named(text: str) -> bool:
    """Whether text ends as the name of a file of layers or of a model does."""
    return Path(text).suffix.lower() in (*SUFFIXES, ".onnx", ".log")


def split_sources(words: Sequence[str]) -> tuple[str, ...]:
    """A command line's words as sources: a descriptor may come in several words.

    >>> split_sources(["a.onnx", "conv1d", "n1", "ic4", "oc4", "i20", "k3", "b.toml"])
    ('a.onnx', 'conv1d n1 ic4 oc4 i20 k3', 'b.toml')
    """
    groups: list[list[str]] = []
    for word in words:
        alone = len(word.split()) != 1 or _is_named(word) or os.path.exists(word)
        if not groups or alone or LINES["descriptors"].recognise(word) or _is_whole(groups[-1]):
            groups.append([word])
        else:
            groups[-1].append(word)
    return tuple(" ".join(group) for group in groups)


def _is_whole(group: Sequence[str]) -> bool:
    """Whether a source takes no more words: a file, or a line in one word."""
    (first, *rest) = group
    if rest:
        return False
    return len(first.split()) != 1 or not any(form.recognise(f"{first} ") for form in LINES.values())


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
        SpecError: there is no such file, it is a folder, empty or unreadable.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise missing(path) from None
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
            keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            for key, count in keys.items():
                if count > 1:
                    raise SpecError(key, "each key once", "a repeated key", where)
            return super().construct_mapping(node, deep)

        def construct_number(self, node: yaml.ScalarNode) -> int | float:
            """As JSON has it: in YAML 1.1 8:1 would be 481, 010 would be 8 and 1_0 would be 10."""
            if not _NUMBER.fullmatch(node.value):
                raise SpecError("file", "numbers in decimal digits", node.value, where)
            if node.tag.endswith("int"):
                return int(node.value)
            return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))

    for kind in ("int", "float"):
        Loader.add_constructor(f"tag:yaml.org,2002:{kind}", Loader.construct_number)
    try:
        loader = Loader(text)
        try:
            root = loader.get_single_node()
            values = 0.0 if root is None else _written_out(root)
            if values > _MOST_VALUES:
                found = "more" if math.isfinite(values) else "an alias within what it stands for"
                raise SpecError("file", f"at most {_MOST_VALUES:,} values, aliases written out", found, where)
            return loader.construct_document(root) if root is not None else None
        finally:
            loader.dispose()
    except SpecError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SpecError("file", "YAML", " ".join(str(error).split()), where) from error


def _written_out(root: Any) -> float:
    """How many values a YAML node stands for where every alias is written out; infinite where one is within itself."""
    sizes: dict[int, float] = {}

    def size(node: Any) -> float:
        if id(node) not in sizes:
            sizes[id(node)] = math.inf  # until it is known: of an alias within itself
            below = node.value if isinstance(node.value, list) else ()
            sizes[id(node)] = 1 + sum(
                sum(map(size, child)) if isinstance(child, tuple) else size(child) for child in below
            )
        return sizes[id(node)]

    return size(root)


_PARSERS: dict[str, Callable[[str, str], Any]] = {
    ".toml": _parse_toml,
    ".yaml": _parse_yaml,
    ".yml": _parse_yaml,
    ".json": _parse_json,
}

# ---- lines ------------------------------------------------------------------------------------


def _lines_of(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a text file without comments and empty ones, each after its place.

    One that ends in a backslash goes on in the next; the backslash stays, as a word between them.
    """
    begun: list[str] = []
    first = 0
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        line = _COMMENT.sub("", line).strip()
        first = first if begun else number
        begun.append(line.removesuffix("\\").rstrip())
        if not line.endswith("\\"):
            if any(begun):
                yield f"{path}: line {first}", " \\ ".join(begun)
            begun = []
    if any(begun):
        yield f"{path}: line {first}", " \\ ".join(begun)


_COMMENT = re.compile(r"(^|\s)#.*")


def _read_lines(lines: Iterable[tuple[str, str]], path: Path | None, skipped: list[str] | None) -> list[SpecEntry]:
    readers = {name: form.reader(path) for name, form in LINES.items()}
    found: list[SpecEntry] = []
    reasons: list[str] = []
    what = "an empty one"
    for where, line in lines:
        what = "lines of which none is about a convolution"
        name = next((name for name, form in LINES.items() if line and form.recognise(line)), None)
        if name is None:
            if path is not None and path.suffix.lower() == ".log":
                continue
            expected = f"one of {', '.join(OPERATORS)}, a benchdnn problem, a line of oneDNN, a MIOpenDriver command"
            if path is not None and path.suffix.lower() not in (".txt", ".log", ""):
                expected += f" (layers by fields: a file that ends in {', '.join(_PARSERS)})"
            word = line.partition(" ")[0]
            if word in SEPARABLE:
                raise SpecError("operator", expected, f"{line[:60]!r}: a separable problem is given alone", where)
            raise SpecError("operator", expected, f"{line[:60]!r}{meant(word, (*OPERATORS, *SEPARABLE))}", where)
        for outcome in readers[name](line, where):
            if isinstance(outcome, tuple):
                found.append(SpecEntry(*outcome))
            elif skipped is None:
                raise outcome
            else:
                reasons.append(str(outcome))
    if skipped is not None:
        skipped += reasons
    if not found and not reasons:
        raise SpecError("layers", "a list of layers", what, str(path or ""))
    # What oneDNN made and did not run is there once.
    return [replace(entry, count=max(entry.count, 1)) for entry in merge(found)]


# ---- the value -> entries ---------------------------------------------------------------------

_FILE_KEYS = ("network", "defaults", "layers")
_LAYER_KEYS = ("name", "count", "spec")


def _entries(value: Any, where: str, skipped: list[str] | None) -> list[SpecEntry]:
    defaults: Any = {}
    if is_keras(value):
        return _keras(value, where, skipped)
    if isinstance(value, Mapping) and "layers" not in value and "defaults" not in value:
        if "models" in value:
            raise SpecError("models", "layers", "a tuning job: `convgen tune --job` takes its file", where)
        value = dict(value)
        _network(value.pop("network", ""), where)
        return [_entry(value, {}, where)]
    if isinstance(value, Mapping):
        for key in value:
            if key not in _FILE_KEYS:
                raise SpecError(
                    str(key), f"one of {', '.join(_FILE_KEYS)}", f"an unknown key{meant(str(key), _FILE_KEYS)}", where
                )
        _network(value.get("network", ""), where)
        defaults, value = value.get("defaults", {}), value.get("layers")
    if not isinstance(defaults, Mapping):
        raise SpecError("defaults", "fields of a layer", repr(defaults), where)
    if not isinstance(value, list) or not value:
        raise SpecError("layers", "a list of layers", "an empty one" if value == [] else repr(value), where)
    entries = []
    for number, layer in enumerate(value, 1):
        try:
            entries.append(_entry(layer, defaults, _place(layer, number, where)))
        except (SpecError, UnsupportedError) as error:
            if skipped is None:
                raise
            skipped.append(str(error))
    return entries


def _keras(config: Mapping[str, Any], where: str, skipped: list[str] | None) -> list[SpecEntry]:
    """The layers of the configuration of a Keras layer or model."""
    from .keras import entries_from_keras  # few commands read one

    reasons: list[str] | None = None if skipped is None else []
    try:
        entries = entries_from_keras(config, skipped=reasons)
        if skipped is not None:
            skipped += [f"{where}: {reason}" for reason in reasons or ()]
        return entries
    except SpecError as error:
        place = f"{where}: {error.where}" if error.where else where
        raise SpecError(error.field, error.expected, error.found, place) from None
    except UnsupportedError as error:
        raise UnsupportedError(f"{where}: {error}") from None


def _network(value: object, where: str) -> None:
    if not isinstance(value, str):
        raise SpecError("network", "a string", repr(value), where)


def _place(layer: object, number: int, where: str) -> str:
    name = layer.get("name") if isinstance(layer, Mapping) else None
    return f"{where}: layer {number}" + (f" ({name})" if isinstance(name, str) else "")


def _entry(layer: object, defaults: Mapping[str, Any], where: str) -> SpecEntry:
    if not isinstance(layer, Mapping):
        hint = ": a descriptor is the field spec of one" if isinstance(layer, str) else ""
        raise SpecError("layer", "fields of a layer", f"{layer!r}{hint}", where)
    fields = {key: value for key, value in layer.items() if key not in _LAYER_KEYS}
    names, count = layer.get("name", ()), layer.get("count", 1)
    names = (names,) if isinstance(names, str) else names
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise SpecError("name", "a string or a list of strings", repr(names), where)
    if any("\ud800" <= character <= "\udfff" for name in names for character in name):
        raise SpecError("name", "text that UTF-8 can encode", repr(names), where)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise SpecError("count", "an integer >= 1", repr(count), where)
    if "spec" not in layer:
        return SpecEntry(ConvSpec.from_dict({**defaults, **fields}, where), count, tuple(names))
    if not isinstance(layer["spec"], str):
        raise SpecError("spec", "a descriptor", repr(layer["spec"]), where)
    if fields or defaults:
        key = next(iter(fields or defaults))
        raise SpecError(str(key), "no other field (nor defaults) beside spec", "one", where)
    return SpecEntry(_descriptor(layer["spec"], where)[0], count, tuple(names))
