"""What the commands print with ``--json``: every document's fields, as text, as JSON Schema and as a page.

A document is an object unless its name says ``[]``: then it is a list of them. A line is a field, its type and what
it is. Types are ``text integer number flag object any``, another document's name in capitals, ``[type]`` for a list,
``{type}`` for an object of any keys; ``?`` behind a type says that it may be null, behind a field's name that the field
may be missing. Seconds are seconds; nothing here is rounded. Fields are added, not taken away or given another meaning.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from ..errors import SpecError, meant

#: Parts that several documents have.
PARTS = {
    "LAYER": """
names    [text]   the nodes or entries that the layer came from
count    integer  how often it occurs
spec     text     its descriptor
""",
    "KERNEL": """
schedule  text     the algorithm
picks     object   its numbers, by name
record    text?    id of the tuning record that it came from; null: a default, or what was asked for
seconds   number?  of a call, in that record; null without one
gflops    number?  10^9 operations per second, of these seconds
note      text     what a user should know; empty where there is nothing
""",
    "CHECK": """
name    text  what was looked at
passed  flag  whether it was right
found   text  what was found
""",
    "REPORT": """
spec          text     the layer
candidate     text     the schedule with its picks
threads       integer  that the kernel runs on
checks        [CHECK]  in the order in which they were made
error_factor  number   what the bound of errors is, in units of rounding errors
worst_error   number?  the largest error, of its bound; null: no number, or no output
repro         text     the command that repeats it
passed        flag     whether all checks passed
""",
    "RECORD": """
schema            integer   version of this form
id                text      SHA-256 of the whole content
trial_key         text      SHA-256 of all but the measurement
spec              text      the layer
target            text      what it was compiled for
hardware          text      the machine's fingerprint
threads           integer   that it ran on
schedule          text      the algorithm
schedule_version  integer   its version
picks             object    its numbers
outcome           text      ok, or how it failed
seconds           number?   median of the samples; null where it failed
samples           [number]  seconds of a call
error             text      of a failure
versions          {text}    of what made the kernel
when              text      ISO 8601, UTC
note              object?   what else is known, such as of a final comparison
""",
    "ROOFLINE": """
threads          integer  that were measured
peak_of          text     what is multiplied: f32, i8 or bf16
peak_flops       number   operations per second, of that
level            text     where the tensors are read from: l2, l3 or dram
bandwidth        number   bytes per second from there
compute_seconds  number   the least time of the operations
memory_seconds   number   the least time of reading and writing the tensors once
seconds          number   the longer of the two
limited_by       text     compute, or the level
""",
    "TIMING": """
name     text      the library, or which of our kernels
version  text?     of the library
way      text      of several ways of using it, the fastest
seconds  number?   of a call, the median; null where it was not timed
rounds   [number]  seconds of each round
problem  text      why it was not timed
""",
    "COMPARED": """
spec       text       the layer
threads    integer    that all run on
mode       text       what a call finds in the caches: warm or cold
flops      integer    operations of a call
kernels    [TIMING]   convgen's, the default last
peers      [TIMING]   other libraries
ratio      number?    the best peer's time over convgen's
interval   [number]?  its 95 % confidence interval
best_peer  text?      its name
""",
    "MADE": """
date         text     of the measurement
cpu          text     the processor
fingerprint  text     of the machine
python       text     its version
versions     {text}   of what made the kernels
""",
    "NETWORK_TIMES": """
model            text       the model's name
target           text       what it was tuned for
threads          integer    that it ran on
layers           integer    how many convolutions took part
default_seconds  number?    with the defaults; null where nothing was timed
seconds          number?    with what is kept
ratio_default    [number]?  the first over the second: median, low, high
won              integer    layers that keep a tuned kernel
lost             integer    layers of which one won alone and does not pay here
reason           text       why nothing was timed, or nothing is kept
whole            flag       whether the seconds are of the whole model
""",
    "HEIGHT": """
height      integer   rows of a strip; 0: no strips
is_default  flag      whether it is what suits the caches
seconds     number    of a call
ratio       [number]  the default's time over this one's: median, low, high
""",
    "TUNED": """
names                [text]     the nodes that the layer came from
models               [text]     the models that have it
count                integer    how often it occurs
spec                 text       its descriptor
target               text       what it was tuned for
threads              integer    that kernels run on
state                text       waiting, searching, comparing, begun, done, out of budget, skipped or failed
reason               text       why the search ended, or was skipped
trials               integer    made in this run
known_trials         integer    made in earlier runs
failures             {integer}  how many trials failed, by outcome
tuning_seconds       number     spent on the layer
default_seconds      number?    of the default
onnxruntime_seconds  number?    of ONNX Runtime
ratio_default        [number]?  the default's time over the winner's in the final comparison: median, low, high
ratio_onnxruntime    [number]?  ONNX Runtime's, likewise
compared             flag       whether the best kernel was timed in turn with the default; else it is of the search
network              object?    how the layer did in its network
best                 RECORD?    what answers now
error?               text       where the state is failed
""",
    "FINDING": """
kind      text     how it fails
message   text     what was found
index     integer  number of the spec
drawn     text?    the command that repeats it as it was drawn
command   text     the command that repeats it, simplified
repeats   flag?    whether it failed again; null where it was not checked again
schedule  text     the algorithm
""",
}
_TUNING = """
job            text             the job's id
target         any              what was tuned for; several: a list
threads        any              thread counts; several: a list
records        text?            file of the store; null without one
seconds        number?          the budget
trials         integer?         the budget
spent_seconds  number           so far, earlier runs included
spent_trials   integer          so far, earlier runs included
skipped        [text]           layers that were left out, and why
networks       [NETWORK_TIMES]  what models take before and after
layers         [TUNED]          each layer
strips?        integer?         of a separable problem: rows of its strips, 0 without strips; null: none is recorded
heights?       [HEIGHT]         of a separable problem: heights of strips that were timed now
"""
#: By command; a second document of the same command has a mark behind it.
DOCUMENTS = {
    "build": """
convgen      text     version
source       text     what was read
target       text     what was built for
threads      integer  that kernels run on
complete     flag     whether all layers were reached
layers       [BUILT]  each layer
folder       text?    where the files are; null where none was written
interrupted  flag     whether Ctrl-C ended it
busy         number?  share of the CPUs that other programs had while something was timed
skipped?     [text]   layers that could not be read, and why
""",
    "compile": """
folder       text?            where the files are; null where the model is refused, or Ctrl-C ended it before
seconds      number?          that it took
manifest     object?          as in manifest.json
taken        flag             false where something of the model is not taken
outside      [REFUSED]        what is not taken
interrupted  flag             whether Ctrl-C ended it
networks     [NETWORK_TIMES]  with --seconds: what tuning brought
profiles     [PROFILE]        with --profile: each size's
""",
    "compile --for onnxruntime": """
model        text?    the file of the model; null where Ctrl-C ended it before
library      text?    the file of the custom operators
seconds      number?  that it took
parts        [PART]   what convgen computes
outside      {text}   nodes that ONNX Runtime computes, and why
interrupted  flag     whether Ctrl-C ended it
""",
    "tune": _TUNING
    + """
interrupted  flag     whether Ctrl-C ended it
busy         number?  share of the CPUs that other programs had meanwhile
""",
    "tune --status": _TUNING,
    "validate": """
target       text       what was built for
threads      integer    that kernels run on
interrupted  flag       whether Ctrl-C ended it
passed       flag       whether all is right
layers       [CHECKED]  each layer
skipped?     [text]     layers that could not be read, and why
""",
    "validate --whole": """
name         text     of the network
threads      integer  that it runs on
checks       [CHECK]  in the order in which they were made
worst_error  number?  the largest error, of its bound
passed       flag     whether all checks passed
""",
    "bench": """
target       text      what was built for
interrupted  flag      whether Ctrl-C ended it
layers       [ROW]     each layer and number of threads
totals       [TOTALS]  by number of threads
failed?      [FAILED]  layers that could not be built or timed
skipped?     [text]    layers that could not be read, and why
""",
    "bench --whole": """
interrupted  flag       whether Ctrl-C ended it
rows         [object]   each model and number of threads, as --rows keeps them
kept         [flag]     of each row, whether it was not measured now, but is from the file of --rows
""",
    "show": """
names      [text]      the nodes that the layer came from
spec       text        its descriptor
key        text        its SHA-256
name       text        a C identifier made of it
fields     object      as ConvSpec takes them
shapes     {[integer]} of each tensor
flops      integer     operations
bytes      {integer}   of each tensor
intensity  number      operations per byte
target     text        what was asked for
roofline   ROOFLINE?   null where the machine cannot be measured
schedules  [APPLIES]   every schedule of such targets
""",
    "show (several layers)": """
flops         integer   of all layers with their counts
convolutions  integer   how many there are
layers        [WORK]    each different layer
skipped       [text]    layers that were left out, and why
separable     [text]    descriptors of the separable problems among them, each once
""",
    "show (separable)": """
spec     text         the problem
flops    integer      operations of both convolutions
between  integer      bytes of what is between the two
parts    {text}       the descriptors of both, depthwise and pointwise
weights  {[integer]}  shape of each array that --weights has
""",
    "report --whole": """
profiles  [PROFILE]  of each of the model's sizes
""",
    "show --ir": """
spec      text    the layer
target    text    what it is compiled for
schedule  text    the algorithm
picks     object  its numbers
kind      text    of code
text      text    the code
""",
    "convert": """
output   text     the file
form     text     the notation
layers   integer  how many were written
skipped  [text]   which were left out, and why
""",
    "schedules[]": """
id       text     the schedule
version  integer  records of another one do not answer
summary  text     what it does
""",
    "targets[]": """
target       text      how it is spelled
family       text      cpu or cuda
summary      text      of the family
resolved     text?     what it means here; null where there is no such thing
vector_bits  integer?  of a register
cores        integer?  that kernels may use
native       flag      whether it runs here
core         object?   what predictions know of a core
""",
    "help[]": """
topic  text  a page
title  text  what it is about
""",
    "help TOPIC": """
topic  text  the page
title  text  what it is about
text   text  the page, as Markdown
""",
    "fuzz": """
seed         integer      of everything that was drawn
target       text         what was built for
start        integer      number of the first spec
seconds      number       that it took
specs        integer      how many were checked
candidates   integer      of these specs
interrupted  flag         whether Ctrl-C ended it
operators    {integer}    specs by operator
dtypes       {integer}    specs by dtype
features     {integer}    specs by what they have
checks       {integer}    checks by name
layers       integer      with --integers, layers that differ in their specs, zero points or scales
skipped      {integer}    candidates that could not be checked, by reason
schedules    {{integer}}  candidates by schedule and operator
errors       {number}     the largest error of its bound, by schedule
slowest      [any]        seconds and command of the slowest candidate
findings     [FINDING]    what failed
""",
    "report": """
title     text      what was tuned
notes     [text]    what a reader should know
settings  [object]  everything tuned for one target and number of threads, as the page shows it
""",
    "records list[]": "=RECORD",
    "records best[]": "=RECORD",
    "records show": """
=RECORD
command         text   that builds its kernel
reason_against  text?  why it does not answer here; null where it may
""",
    "records diff": """
only      {[RECORD]}  the records that only a or b has
common    integer     how many both have
problems  [object]    for each layer, target, machine and number of threads the best of both
""",
    "records check": """
file          text         the store
rows          integer      how many records
ok            flag         whether all are whole
problems      [text]       what is damaged
not_believed  [object]     records that do not answer though they are whole: id and reason
measured?     [object]     with --measure: what was measured again
""",
    "records prune": """
file     text       the store
reasons  {integer}  how many go, by reason
removed  integer    how many went
records  integer    how many stay
""",
    "records recover": """
saved          integer  records that could be read
lost           integer  records that could not
missing_pages  integer  of the file
into           text     the new store
""",
    "records merge": """
added    {integer}  how many came from each store
records  integer    how many there are now
""",
    "records export": """
exported  integer  how many
file      text     where
""",
    "records import": """
added    integer  how many were new
records  integer  how many there are now
""",
    "fleet status[]": """
key      text     of devices
devices  integer  how many there are
free     integer  of them
busy     integer  of them
queued   integer  requests that wait
""",
    "fleet pack": """
bundle   text     the file
bytes    integer  of it
layers   integer  how many
trials   integer  that are in it
known    integer  that the store knows already
failed   integer  that did not compile
errors   [text]   why
skipped?  [text]  layers that could not be read, and why
""",
    "fleet import": """
results  integer  in the file
added    integer  how many were new
records  integer  how many there are now
""",
}
#: Parts of one document each.
INNER = {
    "BUILT": """
=LAYER
=KERNEL?
name?        text     prefix of the C functions
measured?    flag     whether the seconds were taken now, for want of a record
validation?  REPORT?  null where nothing was checked
folder?      text     where its files are; of several layers, below the whole's
error?       text     why it was not exported
""",
    "FAILED": """
=LAYER
threads  integer  that the kernel was to run on
error    text     why
""",
    "REFUSED": """
node    text  which
reason  text  why
""",
    "PROFILE": """
title    text     the size
threads  integer  that it ran on
seconds  number   of all steps
before   number?  with the defaults
steps    [STEP]   in the order in which they run
""",
    "STEP": """
name       text     of the node
computes   text     the convolution's spec, or the operators
schedule   text     of a convolution; empty of others
seconds    number   that it takes
before     number?  what its default takes
predicted  number?  what it was predicted to take; null of other steps
""",
    "PART": """
operator      text     the custom operator
inputs        [text]   tensors
outputs       [text]   tensors
convolutions  integer  how many
passes        integer  other steps
weights       integer  bytes
workspace     integer  bytes of a run
""",
    "CHECKED": """
=LAYER
=KERNEL?
=REPORT?
error?  text  why there is nothing to check
""",
    "ROW": """
=LAYER
=KERNEL
=COMPARED
=MADE
target            text       what was built for
restricted        integer?   bits of the vectors that the peers were kept to
candidates        {text}     the kernels' schedules and picks
peak              number?    measured, in operations per second
peak_of           text       of what: such as f32 peak
roofline          ROOFLINE?  the least time
busy              number?    share of the CPUs that other programs had meanwhile
percent_of_limit  number?    the least time over the time taken
""",
    "TOTALS": """
threads     integer   of the rows
convgen     number    seconds of all layers with their counts
peers       {number}  the same of each peer that ran them all
mean_ratio  number?   geometric mean of the ratios
""",
    "APPLIES": """
id              text      the schedule
version         integer   its version
reason_against  text?     why it does not apply; null where it does
candidates?     integer   points of its space
default?        object    its own picks
is_default?     flag      whether it is taken where nothing was measured
""",
    "WORK": """
=LAYER
flops  integer  of a call
share  number   of all operations
""",
}

_TYPES: dict[str, dict[str, Any]] = {
    "text": {"type": "string"},
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "flag": {"type": "boolean"},
    "object": {"type": "object"},
    "any": {},
}


def fields(text: str) -> dict[str, tuple[str, str, bool]]:
    """The fields that a document's text says: by name, type and meaning, and whether it must be there."""
    found: dict[str, tuple[str, str, bool]] = {}
    for line in filter(None, text.splitlines()):
        if line.startswith("="):
            name, optional = line[1:].removesuffix("?"), line.endswith("?")
            inner = fields({**PARTS, **INNER}[name])
            found |= {key: (kind, said, must and not optional) for key, (kind, said, must) in inner.items()}
            continue
        name, kind, said = re.split(r"\s+", line, maxsplit=2)
        found[name.removesuffix("?")] = kind, said, not name.endswith("?")
    return found


def schema(command: str) -> dict[str, Any]:
    """The JSON Schema (2020-12) of what a command prints, by its name in :data:`DOCUMENTS` without ``[]``.

    Raises:
        SpecError: there is no such document.
    """
    name = command if command in DOCUMENTS else f"{command}[]"
    if name not in DOCUMENTS:
        known = [document.removesuffix("[]") for document in DOCUMENTS]
        raise SpecError("command", f"one of {', '.join(known)}", f"{command!r}{meant(command, known)}")
    made = _object(DOCUMENTS[name])
    made = {"type": "array", "items": made} if name.endswith("[]") else made
    parts = {part: _object(text) for part, text in {**PARTS, **INNER}.items()}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made, "$defs": parts}


def _object(text: str) -> dict[str, Any]:
    known = fields(text)
    return {
        "type": "object",
        "properties": {name: {**_type(kind), "description": said} for name, (kind, said, _) in known.items()},
        "required": [name for name, (_, _, must) in known.items() if must],
        "additionalProperties": False,
    }


def _type(kind: str) -> dict[str, Any]:
    if kind.endswith("?"):
        return {"anyOf": [_type(kind[:-1]), {"type": "null"}]}
    if kind.startswith("["):
        return {"type": "array", "items": _type(kind[1:-1])}
    if kind.startswith("{"):
        return {"type": "object", "additionalProperties": _type(kind[1:-1])}
    return _TYPES.get(kind, {"$ref": f"#/$defs/{kind}"})


# ---- the page ---------------------------------------------------------------------------------

_INTRODUCTION = """\
# JSON of the commands

With `--json` a command prints one document on standard output, and what is for people on standard error. Every field
is here; tests compare what commands print with it. Fields may be added in a minor version; one that is here keeps its
name, its type and its meaning until the next major one. Times are seconds, and numbers are not rounded. What is no
number, such as an infinite error, is null.

`[type]` is a list, `{type}` an object of any keys, `type?` may be null, and a field *if any* may be missing. Types in
capitals are below. `python -m convgen.cli.schema COMMAND` prints the JSON Schema of a command's document.
"""


def page() -> str:
    """The documentation of all documents, as Markdown."""
    lines = [_INTRODUCTION]
    for name, text in DOCUMENTS.items():
        items = ", a list of" if name.endswith("[]") else ""
        lines += [f"## `convgen {name.removesuffix('[]')}`{items}", "", *_rows(text), ""]
    for name, text in {**PARTS, **INNER}.items():
        lines += [f"## {name}", "", *_rows(text), ""]
    return "\n".join(lines).rstrip() + "\n"


def _rows(text: str) -> list[str]:
    rows = ["| field | type | |", "|---|---|---|"]
    for name, (kind, said, must) in fields(text).items():
        rows.append(f"| `{name}` | `{kind}` | {said if must else f'if any: {said}'} |")
    return rows


def main(words: Sequence[str]) -> int:
    """Print the schema of the command that the words name, or the page of all; returns the exit status."""
    try:
        sys.stdout.write(json.dumps(schema(" ".join(words)), indent=2) + "\n" if words else page())
    except SpecError as error:
        sys.stderr.write(f"convgen: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
