"""Specs from descriptors and files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import ROOT
from strategies import specs

from convgen.errors import SpecError, UnsupportedError
from convgen.formats.entries import SpecEntry, merge
from convgen.formats.notation import plain
from convgen.formats.sources import FORMS, dump_specs, format_specs, read_specs, write_text
from convgen.problem.spec import ConvSpec

PROBLEMS = ROOT / "bench" / "problems"
ONE = ConvSpec.parse("conv2d ic4 oc8 i8x8 k3x3 p1 relu")
TWO = ConvSpec.parse("conv1d n2 ic4 oc4 i9 k3")


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# ---- formats ----------------------------------------------------------------------------------

FORMATS = {
    "one.toml": 'ic = 4\noc = 8\nin_spatial = [8, 8]\nkernel = 3\npadding = "same"\nactivation = "relu"\n',
    "one.yaml": "ic: 4\noc: 8\nin_spatial: [8, 8]\nkernel: [3, 3]\npadding: [[1, 1], [1, 1]]\nactivation: relu\n",
    "one.json": '{"ic": 4, "oc": 8, "in_spatial": [8, 8], "kernel": 3, "padding": 1, "activation": "relu"}',
    "descriptor.toml": 'spec = "conv2d ic4 oc8 i8x8 k3 p1 relu"\nnetwork = "one"\n',
    "descriptor.yml": "spec: conv2d ic4 oc8 i8x8 k3 p1 relu\n",
    "lines.txt": "# a comment\n\n  conv2d ic4 oc8 i8x8 k3 same relu  # the only layer\n",
}


@pytest.mark.parametrize("name", FORMATS)
def test_one_layer(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, name, FORMATS[name])
    assert read_specs(path) == read_specs(str(path)) == [SpecEntry(ONE)]


SEVERAL = {
    "layers.toml": """
network = "tiny"
defaults = { ic = 4, activation = "relu" }
layers = [
    { name = "a", oc = 8, in_spatial = [8, 8], kernel = 3, padding = 1 },
    { name = "b", count = 3, n = 2, oc = 4, in_spatial = [9], kernel = 3, activation = "none" },
    { name = ["c", "d"], count = 2, oc = 8, in_spatial = [8, 8], kernel = 3, padding = "same" },
]
""",
    "layers.yaml": """
network: tiny
defaults: {ic: 4, activation: relu}
layers:
  - {name: a, oc: 8, in_spatial: [8, 8], kernel: 3, padding: 1}
  - {name: b, count: 3, n: 2, oc: 4, in_spatial: [9], kernel: 3, activation: none}
  - {name: [c, d], count: 2, oc: 8, in_spatial: [8, 8], kernel: 3, padding: same}
""",
    "layers.json": """
{"network": "tiny", "layers": [
  {"name": "a", "spec": "conv2d ic4 oc8 i8x8 k3 p1 relu"},
  {"name": "b", "count": 3, "spec": "conv1d n2 ic4 oc4 i9 k3"},
  {"name": ["c", "d"], "count": 2, "spec": "conv2d ic4 oc8 i8x8 k3 p1 relu"}]}
""",
    "list.json": """
[{"name": "a", "spec": "conv2d ic4 oc8 i8x8 k3 p1 relu"},
 {"name": "b", "count": 3, "n": 2, "ic": 4, "oc": 4, "in_spatial": [9], "kernel": 3},
 {"name": ["c", "d"], "count": 2, "spec": "conv2d ic4 oc8 i8x8 k3 p1 relu"}]
""",
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_layers(name: str, tmp_path: Path) -> None:
    entries = read_specs(write(tmp_path, name, SEVERAL[name]))
    assert entries == [SpecEntry(ONE, 3, ("a", "c", "d")), SpecEntry(TWO, 3, ("b",))]


BOMB = (
    "layers:\n  - ic: &a6 "
    + "".join(f"[&a{i} " for i in reversed(range(6)))
    + "[1]"
    + "".join(", " + ", ".join([f"*a{i}"] * 30) + "]" for i in range(6))
)


@pytest.mark.parametrize("text", [BOMB, "layers: &a [*a]", "layers: &a {b: *a}"], ids=["bomb", "list", "mapping"])
def test_yaml_aliases_that_stand_for_more_than_a_file_can_hold(tmp_path: Path, text: str) -> None:
    with pytest.raises(
        SpecError, match=r"m\.yaml: file: expected at most 1,000,000 values, aliases written out, found"
    ):
        read_specs(write(tmp_path, "m.yaml", text))


def test_a_long_yaml_mapping_takes_no_longer_than_it_is(tmp_path: Path) -> None:
    """50,000 keys, which compared with each other would take minutes."""
    text = "".join(f"key{i}: 1\n" for i in range(50_000))
    with pytest.raises(SpecError, match="key0"):
        read_specs(write(tmp_path, "m.yaml", text))


def test_yaml_anchors_and_merge_keys(tmp_path: Path) -> None:
    text = "layers:\n  - &a {ic: 4, oc: 8, in_spatial: [8, 8], kernel: 3, padding: 1, activation: relu}\n"
    text += "  - {<<: *a, ic: 8}\n"
    entries = read_specs(write(tmp_path, "m.yaml", text))
    assert [entry.spec for entry in entries] == [ONE, ONE.with_(ic=8)]


def test_byte_order_mark_and_upper_case_suffix(tmp_path: Path) -> None:
    path = tmp_path / "L.TXT"
    path.write_bytes(b"\xef\xbb\xbfconv2d ic4 oc8 i8x8 k3 p1 relu\r\n")
    assert read_specs(path) == [SpecEntry(ONE)]


def test_txt_counts_repeated_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "l.txt", f"{ONE}\n{TWO}\n{ONE}\n")
    assert read_specs(path) == [SpecEntry(ONE, 2), SpecEntry(TWO)]


def test_onnx_file() -> None:
    model = Path(onnx.__file__).parent / "backend/test/data/light/light_squeezenet.onnx"
    assert sum(entry.count for entry in read_specs(str(model))) == 26


@pytest.mark.parametrize("path", sorted(PROBLEMS.glob("*.json")), ids=lambda path: path.stem)
def test_problem_file(path: Path) -> None:
    """Problem files are read, and hold one canonical line per distinct layer."""
    text = json.loads(path.read_text())
    assert text["network"] == path.stem
    entries = read_specs(path)
    assert [(e.spec.descriptor, e.count, e.names) for e in entries] == [
        (layer["spec"], layer["count"], (layer["name"],)) for layer in text["layers"]
    ]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    entries=st.lists(
        st.builds(SpecEntry, specs(), st.integers(1, 3), st.lists(st.text(max_size=5), max_size=2).map(tuple)),
        min_size=1,
        max_size=3,
        unique_by=lambda entry: entry.spec,
    ),
    suffix=st.sampled_from(["toml", "yaml", "yml", "json", "txt"]),
)
def test_dump_round_trip(entries: list[SpecEntry], suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"dump.{suffix}"
    dump_specs(entries, path)
    expected = [SpecEntry(e.spec, e.count) for e in entries] if suffix == "txt" else entries
    assert read_specs(path) == expected


def test_merge() -> None:
    assert merge([SpecEntry(ONE, 2, ("a",)), SpecEntry(TWO), SpecEntry(ONE, 1, ("b",))]) == [
        SpecEntry(ONE, 3, ("a", "b")),
        SpecEntry(TWO),
    ]


# ---- other notations --------------------------------------------------------------------------

BENCHDNN = "mb1ic4oc8ih8kh3ph1"
MIOPEN = "./bin/MIOpenDriver conv -n 1 -c 4 -k 8 -H 8 -W 8 -p 1 -q 1 -b 1"


@pytest.mark.parametrize("line", [f"--attr-post-ops=relu {BENCHDNN}", f"--dir=FWD_B {BENCHDNN}", BENCHDNN, MIOPEN])
def test_a_line_of_another_notation(line: str) -> None:
    activation = "relu" if "relu" in line else "none"
    assert read_specs(line) == [SpecEntry(ONE.with_(activation=activation))]


@pytest.mark.parametrize("name", ["mixed.txt", "mixed.in", "mixed"])
def test_a_text_file_of_several_notations(name: str, tmp_path: Path) -> None:
    text = f'--attr-post-ops=relu\n{BENCHDNN}_n"a"  # first\n{ONE}\n{MIOPEN}\n{BENCHDNN}n"b#c*2"\n'
    entries = read_specs(write(tmp_path, name, text))
    assert entries == [SpecEntry(ONE, 4, ("a", "b#c")), SpecEntry(ONE.with_(activation="none"))]


def test_a_log_has_other_lines(tmp_path: Path) -> None:
    prefix = "MIOpen(HIP): Command [LogCmdConvolution] "
    text = f"epoch 1\n{prefix}{MIOPEN}\nMIOpen(HIP): Info [Find] done\n{prefix}./bin/MIOpenDriver bnorm -n 1\n"
    assert read_specs(write(tmp_path, "train.log", text)) == [SpecEntry(ONE.with_(activation="none"))]


def test_a_long_command_goes_on_in_the_next_line(tmp_path: Path) -> None:
    path = write(tmp_path, "run.sh.txt", MIOPEN.replace(" -k", " \\\n  -k").replace(" -q", "\\\n -q") + " \\")
    assert read_specs(path) == [SpecEntry(ONE.with_(activation="none"))]


def test_what_cannot_be_served_is_left_out_where_that_is_wanted(tmp_path: Path) -> None:
    path = write(tmp_path, "train.txt", f"{MIOPEN} -F 8\n{MIOPEN} -F 1\n--dt=f64,f32 {BENCHDNN}\nconv2d ic4\n")
    with pytest.raises(UnsupportedError, match=r"train.txt: line 1: forw: expected 0 to 7"):
        read_specs(path)
    skipped: list[str] = []
    assert read_specs(path, skipped=skipped) == [SpecEntry(ONE.with_(activation="none"), 2)]
    assert [reason.removeprefix(f"{path}: ").partition(": expected")[0] for reason in skipped] == [
        "line 1: forw",
        "line 3: --dt",
        "line 4: oc",
    ]


def test_keras_configuration(tmp_path: Path) -> None:
    layer = {
        "class_name": "Conv2D",
        "config": {"name": "c", "filters": 8, "kernel_size": [3, 3], "padding": "same", "activation": "relu"},
        "build_config": {"input_shape": [None, 8, 8, 4]},
    }
    assert read_specs(write(tmp_path, "layer.json", json.dumps(layer))) == [
        SpecEntry(ONE.with_(layout="nhwc"), 1, ("c",))
    ]
    del layer["build_config"]
    with pytest.raises(SpecError, match=r"layer.json: .*input_shape: expected"):
        read_specs(write(tmp_path, "layer.json", json.dumps(layer)))
    layer["config"] = {"filters": 8, "kernel_size": 3, "activation": "softmax"}
    layer["build_config"] = {"input_shape": [None, 8, 8, 4]}
    with pytest.raises((SpecError, UnsupportedError), match=r"layer.json: .*activation: expected"):
        read_specs(write(tmp_path, "layer.json", json.dumps(layer)))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    entries=st.lists(
        st.builds(SpecEntry, specs().map(lambda spec: plain(spec.with_(accuracy="standard"))), st.integers(1, 3)),
        min_size=1,
        max_size=3,
        unique_by=lambda entry: entry.spec,
    ),
    form=st.sampled_from(FORMS),
)
def test_every_form_reads_back(entries: list[SpecEntry], form: str, tmp_path: Path) -> None:
    skipped: list[str] = []
    text = format_specs(entries, form, skipped)
    assert form == "miopen" or all("for a layer of integers" in reason for reason in skipped)
    assert form in ("benchdnn", "miopen") or not skipped
    if text:
        found = read_specs(write(tmp_path, f"layers.{form if form in ('toml', 'yaml', 'json') else 'txt'}", text))
        assert len(found) + len(skipped) == len(entries)
        assert all(entry in entries for entry in found)


def test_a_layer_that_a_form_cannot_say() -> None:
    entries = [SpecEntry(TWO), SpecEntry(ONE, 1, ("stem",))]
    with pytest.raises(UnsupportedError, match=r"^layer 1: in_spatial: expected 2 or 3 sizes"):
        format_specs(entries, "miopen")
    with pytest.raises(UnsupportedError, match=r"^layer 1 \(stem\): activation: expected what MIOpenDriver can say"):
        format_specs(entries[1:], "miopen")
    with pytest.raises(SpecError, match="layer 1: count: expected at most"):
        format_specs([SpecEntry(TWO, 10**9)], "descriptors")


# ---- a descriptor or a path -------------------------------------------------------------------


@pytest.mark.parametrize("text", [str(ONE), f"  {ONE}\n", "conv2d ic4 oc8 i8x8 k3 p1 leaky_relu(0.1)"])
def test_descriptor(text: str) -> None:
    assert read_specs(text) == [SpecEntry(ConvSpec.parse(text))]


@pytest.mark.parametrize(
    "name", ["none.toml", "none.onnx", "none.txt", "sub/none.yaml", "two words.json", "none.tml", "a/b"]
)
def test_missing_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for source in (name, Path(name)):
        with pytest.raises(SpecError, match=f"^{name}: file: expected .*, found no such file$"):
            read_specs(source)


@pytest.mark.parametrize("text", ["conv9d", "resnet50", "", " ", "conv4d n1 leaky_relu(0.1)", "CONV2D ic4", "a\0b"])
def test_neither_descriptor_nor_path(text: str) -> None:
    with pytest.raises(SpecError, match="operator: expected one of conv1d"):
        read_specs(text)


def test_wrong_descriptor_with_a_dot_is_a_descriptor() -> None:
    with pytest.raises(SpecError, match="k: expected a descriptor token"):
        read_specs("conv2d ic4 oc4 i8x8 k leaky_relu(0.1)")


# ---- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("f.toml", b"", "file: expected some content, found an empty file"),
        ("f.onnx", b"", "file: expected .* content, found an empty"),
        ("f.onnx", b"not a model at all", "file: expected an ONNX model, found"),
        ("f.txt", b"# nothing\n\n", "layers: expected a list of layers, found an empty one"),
        ("f.json", b'{"ic": "\xff"}', "file: expected UTF-8 text, found byte 0xff at 8"),
        ("f.toml", b"ic = ", "file: expected TOML, found"),
        ("f.toml", b"ic = 4\nic = 5\n", "file: expected TOML, found Cannot overwrite a value"),
        ("f.json", b'{"ic": 4,}', "file: expected JSON, found"),
        ("f.json", b'{"ic": NaN}', "file: expected JSON numbers, found NaN"),
        ("f.json", b'{"ic": ' + b"9" * 5000 + b"}", "file: expected JSON, found Exceeds the limit"),
        ("f.json", b"[" * 100_000, "file: expected JSON, found"),
        ("f.json", b'{"ic": 4, "oc": 4, "ic": 5}', "ic: expected each key once, found a repeated key"),
        ("f.json", b'{"layers": [{"ic": 4, "ic": 4}]}', "ic: expected each key once, found a repeated key"),
        ("f.yaml", b"ic: 4\noc: 4\nic: 5\n", "ic: expected each key once, found a repeated key"),
        ("f.yaml", b"layers:\n  - {ic: 4, ic: 4}\n", "ic: expected each key once, found a repeated key"),
        ("f.yaml", b"a: [1\n", "file: expected YAML, found while parsing"),
        ("f.yaml", b"a: !!python/object/apply:os.system [ls]\n", "file: expected YAML, found could not determine"),
        ("f.yaml", b"ic: 2020-13-45\n", "file: expected YAML, found month must be"),
        ("f.yaml", b"? [a]\n: 1\n", "file: expected YAML, found while constructing"),
        ("f.yaml", b"[" * 5000, "file: expected YAML, found"),
        ("f.yaml", b"&a [*a]\n", "aliases written out, found an alias within what it stands for"),
        ("f.yaml", b"1: 2\n", "1: expected one of accuracy, .*, found an unknown key"),
        ("f.json", b"3", "layers: expected a list of layers, found 3"),
        ("f.json", b"null", "layers: expected a list of layers, found None"),
        ("f.json", b"[]", "layers: expected a list of layers, found an empty one"),
        ("f.json", b'{"layers": []}', "layers: expected a list of layers, found an empty one"),
        ("f.json", b'{"layers": {}}', "layers: expected a list of layers, found {}"),
        ("f.json", b'{"defaults": {"ic": 4}}', "layers: expected a list of layers, found None"),
        ("f.json", b'{"layers": [3]}', "layer 1: layer: expected fields of a layer, found 3"),
        ("f.toml", b'layers = ["conv1d"]', "found 'conv1d': a descriptor is the field spec of one"),
        (
            "f.toml",
            b'models = ["a.onnx"]',
            "models: expected layers, found a tuning job: `convgen tune --job` takes its file",
        ),
        (
            "f.json",
            b'{"layers": [{}], "layer": 1}',
            "layer: expected one of network, defaults, layers, found an unknown",
        ),
        ("f.json", b'{"layers": [{}], "network": 1}', "network: expected a string, found 1"),
        ("f.json", b'{"layers": [{}], "defaults": 1}', "defaults: expected fields of a layer, found 1"),
        ("f.json", b"{}", "ic: expected a value, found none"),
        ("f.json", b'{"grops": 4}', "grops: expected one of accuracy, .*, found an unknown key"),
        ("f.json", b'[{"name": "a", "grops": 4}]', r"f.json: layer 1 \(a\): grops: expected one of accuracy"),
        ("f.toml", b"defaults = {grops = 4}\nlayers = [{}]", "f.toml: layer 1: grops: expected one of accuracy"),
        ("f.json", b'[{"spec": "conv2d"}, {"name": "b"}]', "f.json: layer 1: ic: expected a token"),
        ("f.json", b'[{"name": 3, "ic": 4}]', "layer 1: name: expected a string or a list of strings, found 3"),
        ("f.json", b'[{"name": [3]}]', "layer 1: name: expected a string or a list of strings, found"),
        ("f.json", b'[{"count": 0}]', "layer 1: count: expected an integer >= 1, found 0"),
        ("f.json", b'[{"count": true}]', "layer 1: count: expected an integer >= 1, found True"),
        ("f.json", b'[{"count": 1.5}]', "layer 1: count: expected an integer >= 1, found 1.5"),
        ("f.json", b'[{"spec": 3}]', "layer 1: spec: expected a descriptor, found 3"),
        ("f.json", b'{"spec": "conv1d ic1 oc1 i4 k1", "ic": 4}', "ic: expected no other field"),
        (
            "f.json",
            b'{"defaults": {"n": 4}, "layers": [{"spec": "conv1d ic1 oc1 i4 k1"}]}',
            r"layer 1: n: expected no other field \(nor defaults\) beside spec",
        ),
        ("f.txt", b"conv1d ic1 oc1 i4 k1\nconv1d ic1 k1\n", "f.txt: line 2: oc: expected a token"),
        ("f.cfg", b"\n\nx\n", "f.cfg: line 3: operator: expected one of conv1d, .* by fields: .*, found 'x'"),
        ("f.txt", b"separable2d n1 ic4 oc4 i8x8 k3\n", "line 1: operator: .*: a separable problem is given alone"),
        ("shapes_plain", b"ic4oc4ih5kh1\nic4oc4ih5\n", "shapes_plain: line 2: kh: expected a size of 1 or more"),
        ("f.log", b"nothing\nto see here\n", "f.log: layers: expected a list of layers, found lines of which none is"),
        ("f.log", b"time\n./bin/MIOpenDriver conv -n x\n", "f.log: line 2: batchsize: expected an integer"),
        ("f.txt", b"--dir=FWD_D\n", "f.txt: layers: expected a list of layers, found lines of which none is"),
        ("f.txt", b"./bin/MIOpenDriver conv -n 1 \\\n  --frob 1\n", "f.txt: line 1: --frob: expected a flag"),
        ("f.json", b'{"class_name": "Conv2D", "config": {}}', "f.json: .*expected"),
    ],
)
def test_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SpecError, match=message) as caught:
        read_specs(str(path))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["toml", "onnx"])
def test_directory(suffix: str, tmp_path: Path) -> None:
    folder = tmp_path / f"folder.{suffix}"
    folder.mkdir()
    with pytest.raises(SpecError, match="file: expected a file, found a directory"):
        read_specs(folder)


def test_folder_without_suffix(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="file: expected a file"):
        read_specs(str(tmp_path))


def test_dims_belong_to_onnx(tmp_path: Path) -> None:
    path = write(tmp_path, "l.txt", str(ONE))
    for source in (path, str(ONE)):
        with pytest.raises(SpecError, match="dims: expected an ONNX model to use them in"):
            read_specs(source, {"N": 1})


def test_dump_refuses(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"file: expected a file that ends in \.toml"):
        dump_specs([SpecEntry(ONE)], tmp_path / "x.onnx")
    with pytest.raises(SpecError, match="file: expected a file that can be written"):
        dump_specs([SpecEntry(ONE)], tmp_path / "no" / "x.json")


def test_what_is_written_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    write_text("old\n", path)
    path.chmod(0o640)
    (tmp_path / "link").symlink_to(path)
    write_text("new\n", tmp_path / "link")
    assert path.read_text() == "new\n"
    assert path.stat().st_mode & 0o777 == 0o640
    with pytest.raises(UnicodeEncodeError):
        write_text("\ud800", path)
    assert path.read_text() == "new\n"
    with pytest.raises(OSError, match="No such file") as caught:
        write_text("", tmp_path / "no" / "out.txt")
    assert caught.value.filename == str(tmp_path / "no" / "out.txt")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link", "out.txt"]


def test_reading_a_descriptor_imports_nothing_heavy() -> None:
    code = (
        "import sys; from convgen.formats.sources import read_specs; read_specs('conv1d ic1 oc1 i4 k1');"
        "print(*{'numpy', 'onnx', 'tvm', 'yaml', 'onnxruntime'} & set(sys.modules))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROBLEMS.parents[1]
    )
    assert found.stdout.strip() == ""


@pytest.mark.parametrize("number", ["8:1", "010", "1_0", "0x10", "1_0.5"])
def test_a_yaml_number_is_what_it_looks_like(number: str, tmp_path: Path) -> None:
    """YAML 1.1 has 8:1 for 481, in base 60."""
    path = tmp_path / "layers.yaml"
    path.write_text(f"layers:\n  - {{ic: {number}, oc: 4, kernel: 3, in_spatial: [9, 9]}}\n")
    with pytest.raises(SpecError, match=f"layers.yaml: file: expected numbers in decimal digits, found {number}"):
        read_specs(path)
