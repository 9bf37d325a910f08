"""The command line: it parses, calls the core and prints.

Nothing heavy is imported before the arguments are known to be right, so that ``--help`` and wrong
ones answer at once: a command's module is imported for that command alone, and TVM, ONNX, NumPy and rich inside it.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections import UserDict
from collections.abc import Iterator, Sequence
from importlib import import_module

import click

from ..deferred import keep_torch_out
from ..errors import ConvgenError, ExportError, FolderError, Inapplicable, RecordError, SpecError, UnsupportedError
from .common import FAILED, INTERRUPTED, SPEC_HELP, TROUBLE, WRONG, Choice, note, say

_STATUS = """\
\b
Exit status:
    0  all is well
    1  a kernel failed validation, or a build failed
    2  wrong usage, a wrong spec, or a model of which something is not taken
    3  records, an export or a file could not be read or written
  130  interrupted; what was measured is kept
"""

#: What shells ask with: click's name for the program.
_COMPLETE = "_CONVGEN_COMPLETE"

#: Each command's module in this folder, and its name there.
_COMMANDS = {
    "build": "generate.build",
    "compile": "network.compile_model",
    "tune": "tune.tune",
    "validate": "generate.validate",
    "fuzz": "fuzz.fuzz",
    "bench": "bench.bench",
    "show": "show.show",
    "convert": "convert.convert",
    "records": "records.records",
    "report": "report.report",
    "fleet": "fleet.fleet",
    "targets": "show.targets",
    "schedules": "show.schedules",
    "help": "topic.show_help",
}


class _Commands(UserDict[str, click.Command]):
    """Commands by name, each imported when it is first asked for."""

    def __contains__(self, name: object) -> bool:
        return name in self.data or name in _COMMANDS

    def __iter__(self) -> Iterator[str]:
        return iter([*_COMMANDS, *self.data.keys() - _COMMANDS.keys()])

    def __len__(self) -> int:
        return len(_COMMANDS.keys() | self.data.keys())

    def __missing__(self, name: str) -> click.Command:
        module, _, attribute = _COMMANDS[name].partition(".")
        command: click.Command = getattr(import_module(f".{module}", __name__), attribute)
        self.data[name] = command
        return command


@click.group(
    commands=_Commands(),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=f"{_STATUS}\n{SPEC_HELP}",
)
@click.version_option(package_name="convgen", message="convgen %(version)s")
def cli() -> None:
    """Tuned, validated convolution kernels from a declarative spec, and libraries that run whole models.

    Each command takes a SPEC, a FILE of layers (TOML, YAML, JSON, text) or a MODEL.onnx.
    """


@cli.command()
@click.argument("shell", type=Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    \b
    bash:  eval "$(convgen completion bash)"      in ~/.bashrc
    zsh:   eval "$(convgen completion zsh)"       in ~/.zshrc
    fish:  convgen completion fish | source       in config.fish
    """  # noqa: D301 - click's mark for a paragraph that is not to be wrapped
    from .shells import shell as shell_class

    made = shell_class(shell)
    if made is None:
        raise click.UsageError(f"no completion for {shell}")
    say(made(cli, {}, "convgen", _COMPLETE).source())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (the process's own where None); returns its exit status."""
    keep_torch_out()
    if completing := os.environ.get(_COMPLETE):
        from .shells import shell

        shell(completing.partition("_")[0])
    if isinstance(sys.stdout, io.TextIOWrapper):  # what its encoding lacks is escaped, as on standard error
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = cli.main(arguments, prog_name="convgen", standalone_mode=False)
        sys.stdout.flush()
        return int(status or 0)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", INTERRUPTED)
    except click.exceptions.NoArgsIsHelpError as error:
        say(error.ctx.get_help() if error.ctx else "", err=True)
        return WRONG
    except click.UsageError as error:
        help_line = f" (see: {error.ctx.command_path} --help)" if error.ctx else ""
        return _fail(error.format_message() + help_line, WRONG)
    except (BrokenPipeError, SystemExit) as error:  # click exits where it finds the pipe closed
        if isinstance(error, SystemExit) and not error.code:  # or has completed a word
            return 0
        # Whoever read has enough. Nothing more must be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (SpecError, UnsupportedError, Inapplicable) as error:
        return _fail(str(error), WRONG)
    except (RecordError, ExportError, FolderError, OSError) as error:
        return _fail(str(error), TROUBLE)
    except ConvgenError as error:
        return _fail(str(error), FAILED)


def _fail(message: str, status: int) -> int:
    note(f"convgen: {' '.join(message.split())}")
    return status
