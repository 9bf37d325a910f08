"""An unpacked bundle, checked."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

from .devices import DEVICES
from .errors import Trouble
from .results import FORMAT

#: The fields that make two trials the same, but for the machine.
IDENTITY = ("spec", "target", "threads", "schedule", "schedule_version", "picks", "versions")


class Bundle:
    """An unpacked bundle.

    Attributes:
        root: its folder.
        manifest: what its ``manifest.json`` says; ``digest`` is the SHA-256 of that file.

    Raises:
        Trouble: it is not one, of another version, or a file is not what the manifest says.
    """

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)
        path = os.path.join(self.root, "manifest.json")
        try:
            with open(path, "rb") as file:
                data = file.read()
            self.manifest: dict[str, Any] = json.loads(data)
            found = self.manifest["format"]
        except OSError as error:
            raise Trouble(f"{path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise Trouble(f"{path}: expected the manifest of a bundle, found {error}") from None
        if found != FORMAT:
            raise Trouble(f"{path}: format: expected {FORMAT}, found {found}")
        if self.manifest["device"] not in DEVICES:
            raise Trouble(f"{path}: device: expected {' or '.join(DEVICES)}, found {self.manifest['device']}")
        self.digest = hashlib.sha256(data).hexdigest()
        for name, expected in self.manifest["files"].items():
            self._check(name, expected)

    def feature(self, trial: dict[str, Any]) -> str:
        """What a trial's layer checks, where it is one of a self-check; empty where it is not."""
        found: str = self.manifest["layers"][trial["layer"]].get("feature", "")
        return found

    def _check(self, name: str, expected: str) -> None:
        path = os.path.join(self.root, name)
        if not os.path.realpath(path).startswith(os.path.realpath(self.root) + os.sep):
            raise Trouble(f"manifest.json: files: expected names within the bundle, found {name!r}")
        sha = hashlib.sha256()
        try:
            with open(path, "rb") as file:
                for part in iter(lambda: file.read(1 << 20), b""):
                    sha.update(part)
        except OSError as error:
            raise Trouble(f"{path}: {error.strerror}") from None
        if sha.hexdigest() != expected:
            raise Trouble(f"{path}: expected SHA-256 {expected}, found {sha.hexdigest()}: the bundle was damaged")
