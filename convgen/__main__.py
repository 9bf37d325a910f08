"""``python -m convgen``, and the ``convgen`` command."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def main() -> None:
    """Run the command line and exit with its status.

    Nothing is imported from the working directory, here or in the Python processes that are started, TVM's among
    them. (But ``python -m convgen`` looks there for ``convgen`` itself, before this is reached.)
    """
    with suppress(OSError):  # it may be gone
        if not sys.flags.safe_path and sys.path[0] in ("", os.getcwd()):
            del sys.path[0]
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        from .cli import main as run

        status = run()
    except KeyboardInterrupt:  # while the command line, which says the same, is being loaded
        sys.stderr.write("convgen: interrupted\n")
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    main()
