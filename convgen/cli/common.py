"""What the commands share: arguments, exit statuses, and how results are printed."""

from __future__ import annotations

import json
import math
import os
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import BuildError, ExportError, Inapplicable, RecordError, SpecError, UnsupportedError, meant
from ..folders import TemporaryFolder
from ..formats.entries import AccuracyRule, SpecEntry, with_accuracy
from ..formats.sources import read_specs, sizes_for
from ..lowering.toolchain import check_libc
from ..measure.standalone.words import one_line, printable
from ..report.words import plural
from .completion import complete_accuracy, complete_spec, one_of, schedules_beginning, targets_beginning

if TYPE_CHECKING:
    from ..hardware.target import Target
    from ..lowering.schedule import Candidate
    from ..records.opening import Records

OK, FAILED, WRONG, TROUBLE, INTERRUPTED = 0, 1, 2, 3, 130

#: Characters of a document that are kept in memory until it is whole.
_SPOOLED = 1 << 24
#: How many reasons for left out layers are printed; --json gives all.
REASONS = 20

#: What a spec looks like, for the help of commands that take one.
SPEC_HELP = """\
\b
A SPEC is one line, quoted or not, such as
  conv2d n1 ic64 oc64 i56x56 k3x3 s1x1 p1x1 relu
operator: conv1d conv2d conv3d convtranspose1d convtranspose2d convtranspose3d
          separable1d separable2d separable3d (depthwise, then 1x1)
tokens:   n ic oc  g (groups)  i (input)  k (kernel)  s (stride)  d (dilation)
          p (padding: p1x1, begin_end p0_1x0_1, same, same_lower, valid)
          op (output padding)  nobias  residual  f16, bf16 or i8
          nhwc, nchw8c or nchw16c; dst_nchw … where dst's layout is another
          strict, relaxed, tf32 or accuracy_bf16; an activation: relu relu6
          leaky_relu(0.1)
          prelu clip(0,6) sigmoid tanh silu mish hardswish hardsigmoid elu
          gelu gelu_tanh
          of separable ones m (outputs of each depthwise input),
          depthwise_bias, depthwise_relu6 …
"""

Command = TypeVar("Command", bound=Callable[..., Any])
#: A decorator that gives a command an option or an argument.
Option = Callable[[Any], Any]

# ---- arguments --------------------------------------------------------------------------------


def _parse_dims(context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> dict[str, int]:
    dims = {}
    for text in values:
        name, _, size = text.partition("=")
        if not name or not size.isdecimal() or name in dims:
            raise click.BadParameter(f"expected NAME=SIZE, each name once, found {text!r}")
        dims[name] = int(size)
    return dims


def _parse_sizes(
    context: click.Context, parameter: click.Parameter, values: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    dims = {}
    for text in values:
        name, _, sizes = text.partition("=")
        numbers = sizes.split(",")
        if not name or not all(number.isdecimal() for number in numbers) or name in dims:
            raise click.BadParameter(f"expected NAME=SIZE,…, each name once, found {text!r}")
        dims[name] = tuple(map(int, numbers))
    return dims


def single_sizes(dims: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """The sizes of dimensions, of which layers have one each."""
    for name, sizes in dims.items():
        if len(sizes) > 1:
            found = ",".join(map(str, sizes))
            raise click.UsageError(f"--dim: expected {name}=SIZE, or several with --whole, found {name}={found}")
    return {name: size for name, (size,) in dims.items()}


def _parse_accuracy(
    context: click.Context, parameter: click.Parameter, values: Sequence[str]
) -> tuple[AccuracyRule, ...]:
    try:
        return tuple(map(AccuracyRule.parse, values))
    except SpecError as error:
        raise click.BadParameter(f"expected {error.expected}, found {error.found}") from None


def check_target(context: click.Context, parameter: click.Parameter, spelling: str) -> str:
    """The spelling of a target, of a family there is."""
    from ..hardware.discover import target_families

    families = target_families()
    if spelling.partition(":")[0] not in families:
        from ..hardware.target import meant_target

        expected = f"expected one of {', '.join(families)}, or one that `convgen targets` lists"
        raise click.BadParameter(f"{expected}, found {spelling!r}{meant_target(spelling)}")
    return spelling


def _parse_threads(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """Thread counts joined by commas, each once."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= 1024 for part in parts):
        raise click.BadParameter(f"expected numbers from 1 to 1024, such as 1,2, found {text!r}")
    return tuple(dict.fromkeys(map(int, parts)))


def check_page(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """The name of a file that a report is written to."""
    if path is not None and path.suffix not in (".md", ".html"):
        raise click.BadParameter(f"expected a file name that ends in .html or .md, found {path.name!r}")
    return path


def _check_schedule(context: click.Context, parameter: click.Parameter, name: str | None) -> str | None:
    from ..lowering.discover import schedule_ids

    if name is not None and name not in schedule_ids():
        raise click.BadParameter(
            f"expected one of {', '.join(schedule_ids())}, found {name!r}{meant(name, schedule_ids())}"
        )
    return name


class Choice(click.Choice[str]):
    """One of several words; says which of them another one is like."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        return f"expected one of {', '.join(self.choices)}, found {value!r}{meant(str(value), self.choices)}"


def grouped(*options: Option) -> Option:
    """Several options and arguments as one decorator, shown in this order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


#: Gives ``dims``.
dim_option = click.option(
    "--dim",
    "dims",
    multiple=True,
    callback=_parse_dims,
    metavar="NAME=SIZE",
    help="Size of a model's symbolic dimension; may be repeated.",
)
#: Gives ``dims``, each with one or several sizes.
sizes_option = click.option(
    "--dim",
    "dims",
    multiple=True,
    callback=_parse_sizes,
    metavar="NAME=SIZE,…",
    help="Size of a model's symbolic dimension; may be repeated. With several sizes the library is made for each.",
)
#: What accuracy classes mean, for help.
CLASSES = (
    "CLASS is strict, which no data can spoil; standard, faster: an infinity, a NaN or a much larger pixel spoils the "
    "results beside it; relaxed, which loses more digits; tf32 or bf16, which round what is multiplied; or, of whole "
    "models for GPUs, f16. See `convgen help accuracy`."
)
#: Gives ``accuracy``, a tuple of rules.
accuracy_option = click.option(
    "--accuracy",
    multiple=True,
    callback=_parse_accuracy,
    shell_complete=complete_accuracy,
    metavar="[NAME=]CLASS",
    help="Accuracy of all layers, or, with NAME=, of those whose name matches, such as 'head.*=strict'; may be "
    f"repeated, the last that names a layer counts. {CLASSES}  [default: what the layer says, else standard]",
)
#: What is said of a model's layers; gives ``dims`` and ``accuracy``.
model_options = grouped(dim_option, accuracy_option)
_spec_argument = click.argument(
    "spec", nargs=-1, required=True, metavar="SPEC|FILE|MODEL.onnx", shell_complete=complete_spec
)
#: What to work on; gives ``spec`` (words), ``dims`` and ``accuracy``.
layers_argument = grouped(_spec_argument, model_options)
#: The same, with several sizes of a dimension.
models_argument = grouped(_spec_argument, sizes_option, accuracy_option)


def _check_libc(context: click.Context, parameter: click.Parameter, libc: str | None) -> str | None:
    if libc is not None:
        try:
            check_libc(libc)
        except BuildError as error:
            raise click.BadParameter(str(error).removeprefix("libc: ")) from None
    return libc


libc_option = click.option(
    "--libc",
    metavar="LIBC",
    callback=_check_libc,
    shell_complete=one_of(("musl", "glibc-2.28")),
    help="C library that the exported library is for: musl, or the oldest glibc that it runs with, such as glibc-2.28. "
    "Takes zig: pip install ziglang.  [default: what the C compiler has]",
)
target_option = click.option(
    "--target",
    default="cpu",
    show_default=True,
    callback=check_target,
    shell_complete=one_of(targets_beginning),
    metavar="TARGET",
    help="What to build for: cpu (this machine's), cpu:<LLVM processor>, cuda (this machine's GPU), or an "
    "architecture such as cuda:sm_90a, for which no GPU is needed.",
)


def threads_option(meaning: str = "Threads that a kernel runs on; 1 on a GPU.  [default: all cores]") -> Option:
    """``--threads N``, which means this to the command."""
    return click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help=meaning)


def thread_counts_option(meaning: str) -> Option:
    """``--threads N,…``, which means this to the command; gives a tuple, or None."""
    return click.option("--threads", callback=_parse_threads, metavar="N,…", help=meaning)


def store_option(name: str = "records") -> Option:
    """``--records FILE``; gives ``name``, a path or None."""
    return click.option(
        "--records",
        name,
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Record store.  [default: $CONVGEN_RECORDS, or one in the user's cache]",
    )


#: Gives ``records`` (a path or None) and ``no_records``.
records_options = grouped(
    store_option(), click.option("--no-records", is_flag=True, help="Neither read nor write records.")
)
trials_option = click.option(
    "--trials",
    type=click.IntRange(min=0),
    metavar="N",
    help="Trials per layer, including those of earlier runs; 0: none.",
)


def whole_accuracy(rules: Sequence[AccuracyRule]) -> str:
    """The accuracy class of all convolutions of a model that is taken as a whole."""
    if named := [rule for rule in rules if rule.pattern is not None]:
        raise click.UsageError(f"--whole: expected an accuracy class for the whole model, found {named[0]}")
    return rules[-1].accuracy if rules else "standard"


class FiniteRange(click.FloatRange):
    """A number in a range; neither an infinity nor NaN, which compares as in any range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"expected a finite number, found {value!r}", param, ctx)
        return number


#: Of ``--seconds`` and the like.
NON_NEGATIVE = FiniteRange(min=0)
budget_options = grouped(
    trials_option,
    click.option("--seconds", type=NON_NEGATIVE, metavar="S", help="Tuning time for all layers together; 0: none."),
)


def schedule_option(meaning: str) -> Option:
    """``--schedule``, which means this to the command."""
    return click.option(
        "--schedule", callback=_check_schedule, shell_complete=one_of(schedules_beginning), metavar="ID", help=meaning
    )


candidate_options = grouped(
    schedule_option("Use this schedule instead of the best record or the default."),
    click.option(
        "--picks", metavar="TEXT", help='Picks of that schedule, such as "tile_oc=32 tile_ow=14".  [default: its own]'
    ),
)
#: Gives ``skip``.
skip_option = click.option(
    "--skip", is_flag=True, help="Layers that cannot be read are no failure: they are left out, and listed, either way."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


def read_layers(
    words: Sequence[str],
    dims: dict[str, int] | None = None,
    accuracy: Sequence[AccuracyRule] = (),
    skipped: list[str] | None = None,
) -> list[SpecEntry]:
    """The layers of a spec in one or several words, of a file or of a model; see :func:`read_specs`."""
    return with_accuracy([read_specs(" ".join(words), dims or None, skipped)], accuracy)[0]


def layers_of(
    sources: Sequence[str],
    dims: dict[str, int] | None = None,
    accuracy: Sequence[AccuracyRule] = (),
    *,
    fits: bool = True,
) -> tuple[list[list[SpecEntry]], list[str]]:
    """The layers of each source, and why others of it are left out, which is noted.

    This is how all commands that work on layers read them: one that is refused does not stop the others.

    Args:
        sources: each as :func:`read_specs` takes it.
        dims, accuracy: as :func:`read_layers` takes them.
        fits: whether the layers' tensors must fit into this machine's memory.

    Raises:
        SpecError, UnsupportedError: nothing of a source can be read.
    """
    from ..hardware.machine import check_memory

    models, reasons = [], []
    for source, sizes in zip(sources, sizes_for(sources, dims), strict=True):
        skipped: list[str] = []
        # Where nothing could be read the second one raises: it says what is wrong.
        entries, kept = read_specs(source, sizes, skipped) or read_specs(source, sizes), []
        for entry in entries:
            try:
                if fits:
                    check_memory(entry.spec)
                kept.append(entry)
            except SpecError as error:
                if len(entries) == 1:
                    raise
                skipped.append(str(error))
        models.append(kept)
        reasons += skipped
    note_left_out(reasons)
    return with_accuracy(models, accuracy), reasons


def status_of(left_out: Sequence[str], skip: bool) -> int:
    """The exit status of a command that did what it could: of one that left out layers, unless that was said before."""
    if not left_out or skip:
        return OK
    note(f"convgen: {plural(len(left_out), 'layer')} left out, as said above; with --skip that is no failure")
    return WRONG


def chosen_records(records: Path | None, no_records: bool, writes: bool = False) -> Records:
    """What the options say about records, as :func:`convgen.records.opening.open_store` takes it.

    Raises:
        RecordError: a command that does not search is to read a store that is not there.
    """
    if records is not None and no_records:
        raise click.UsageError("give either --records or --no-records, not both")
    if records is not None and not writes and not records.exists():
        raise RecordError(f"{records}: no such file")
    from ..records.opening import refused_default

    if records is None and not no_records and (refused := refused_default()):
        note(f"convgen: {refused}: cannot be made, so no records are used or kept; CONVGEN_RECORDS names it")
    return False if no_records else records


def check_picks(schedule: str | None, picks: str | None) -> None:
    """Refuse picks without the schedule they belong to."""
    if picks is not None and schedule is None:
        raise click.UsageError("--picks needs --schedule")


def forced_candidates(
    entries: Sequence[SpecEntry], target: Target, schedule: str | None, picks: str | None
) -> list[Candidate | None]:
    """Per layer the candidate that --schedule and --picks name; None without them."""
    from ..lowering.candidates import parse_candidate

    if schedule is None:
        return [None] * len(entries)
    try:
        return [parse_candidate(entry.spec, target, schedule, picks) for entry in entries]
    except Inapplicable as error:
        raise Inapplicable(f"--schedule {schedule}: {error}") from error


def check_library_name(name: str | None) -> None:
    """Raise a usage error where no library may be called so."""
    from ..kernel.names import check_export_name

    if name is not None:
        try:
            check_export_name(name)
        except (BuildError, ExportError) as error:
            raise click.UsageError(f"--{error}") from None


def check_names(option: str, text: str, known: Iterable[str]) -> list[str]:
    """A comma-separated list, each item known and once."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = list(known)
    for name in names:
        if name not in known:
            raise UnsupportedError(f"{option}: expected some of {', '.join(known)}, found {name!r}{meant(name, known)}")
    return list(dict.fromkeys(names))


# ---- results ----------------------------------------------------------------------------------


# Everything that commands print goes through these: what names, files and machines bring is shown, not obeyed.


def emit(document: object) -> None:
    """Print a result as the one JSON document on standard output."""
    emit_text(json.dumps(_finite(document), indent=2, allow_nan=False))


def emit_text(document: str, end: str = "\n") -> None:
    """Print JSON on standard output: the one control character that JSON leaves as it is, escaped as well."""
    click.echo(document.replace("\x7f", "\\u007f") + end, nl=False)


def emit_each(items: Iterable[object]) -> None:
    """Print what :func:`emit` prints for a list, however long, once all items have come: half of it is no document."""
    with (
        TemporaryFolder() as folder,
        tempfile.SpooledTemporaryFile(_SPOOLED, "w+", encoding="utf-8", newline="", dir=str(folder)) as whole,
    ):
        opened = False
        for item in items:
            text = json.dumps(_finite(item), indent=2, allow_nan=False)
            whole.write((",\n" if opened else "[\n") + textwrap.indent(text, "  "))
            opened = True
        whole.seek(0)
        while text := whole.read(_SPOOLED):
            emit_text(text, end="")
    emit_text("\n]" if opened else "[]")


def _finite(value: Any) -> Any:
    """The value as JSON can express it: infinity and NaN become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say(text: str, err: bool = False) -> None:
    """Print text for people, of one or several lines; on standard output unless ``err``."""
    click.echo(printable(text, keep="\n\t"), err=err)


def note(message: str) -> None:
    """A line for people, on standard error."""
    click.echo(one_line(message), err=True)


def note_busy(shares: Iterable[float | None], threads: Iterable[int]) -> None:
    """Say that figures are not reliable where other programs had much of the CPUs while they were taken, or where there
    are fewer CPUs than threads.

    Args:
        shares: of the CPUs' time that others used, as far as it is known.
        threads: the numbers of threads that figures were taken on.
    """
    from ..measure.busy import busy_warning, crowd_warning

    for warning in (busy_warning(shares), crowd_warning(threads)):
        if warning:
            note(f"convgen: {warning}")


def note_left_out(reasons: Sequence[str]) -> None:
    """Say why layers are missing from a result; of many reasons, the first."""
    for reason in reasons[:REASONS]:
        note(f"left out: {reason}")
    if len(reasons) > REASONS:
        note(f"left out: {len(reasons) - REASONS} more")


def duration(seconds: float | None) -> str:
    """``512.3 µs``: four digits in the unit that suits."""
    if seconds is None:
        return "–"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds / 1e-9:.4g} ns"


def rate(flops: float, seconds: float | None) -> str:
    """GFLOP/s."""
    return f"{flops / seconds / 1e9:.4g}" if seconds else "–"


def size(count: float) -> str:
    """Bytes in the unit that suits."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= factor:
            return f"{count / factor:.4g} {unit}"
    return f"{count:.0f} B"


def label(entry: SpecEntry) -> str:
    """A layer's name in lists: its first name, and how often it occurs."""
    name = entry.names[0] if entry.names else ""
    return f"{name} ×{entry.count}".strip() if entry.count > 1 else name


def tidy(path: Path) -> str:
    """A path as people write it, printable: relative where it is below here, else with ``~``."""
    absolute = path.absolute()
    if absolute.is_relative_to(Path.cwd()):
        return printable(str(absolute.relative_to(Path.cwd())))
    home, text = os.path.expanduser("~"), str(absolute)
    return printable(text.replace(home, "~", 1) if text.startswith(home + os.sep) else text)
