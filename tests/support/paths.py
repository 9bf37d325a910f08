"""Where things are in the checkout."""

from __future__ import annotations

from pathlib import Path

#: The checkout.
ROOT = Path(__file__).resolve().parents[2]
#: Modules, programs and data that tests share.
SUPPORT = ROOT / "tests" / "support"
