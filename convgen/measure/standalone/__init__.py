"""Measures a bundle of compiled candidates on a machine that has Python 3.8 or later and nothing else.

`convgen fleet pack` puts these modules into the bundle as ``run.py``, an archive that Python runs. They need the
standard library only and, for a GPU's kernels, its driver: no convgen, no NumPy, no compiler, no network. They import
each other relatively and nothing else of convgen, which itself measures by :mod:`~convgen.measure.standalone.timing`
and :mod:`~convgen.measure.standalone.gpu`.

Top to bottom: errors, words | timing, facts | interface, driver, gpu, devices | child | results, bundle | session |
command.
"""

from __future__ import annotations

import os

#: The folder or the archive that this package lies in.
LOCATION = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
