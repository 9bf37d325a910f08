"""Hashes that are kept."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import replace

from paths import ROOT

from convgen.hardware.target import resolve
from convgen.problem.spec import ConvSpec

LAYER = "conv2d n1 ic8 oc8 i6x6 k3x3 relu"


def test_equal_ones_have_the_same_hash_and_others_their_own() -> None:
    spec, target = ConvSpec.parse(LAYER), resolve("cpu:haswell")
    assert hash(spec) == hash(ConvSpec.parse(LAYER)) == hash(spec)
    assert hash(spec) != hash(spec.with_(oc=16))
    assert hash(target) == hash(replace(target))
    assert hash(target) != hash(replace(target, cores=target.cores + 1))


def test_a_hash_stays_in_its_process() -> None:
    """That of a text differs from process to process."""
    spec, target = ConvSpec.parse(LAYER), resolve("cpu:haswell")
    known = {spec: 1, target: 2}
    program = (
        "import pickle, sys; from convgen.hardware.target import resolve; from convgen.problem.spec import ConvSpec\n"
        "spec, target = pickle.loads(sys.stdin.buffer.read())\n"
        f"print({{ConvSpec.parse({LAYER!r}): 3}}[spec], {{resolve('cpu:haswell'): 4}}[target])"
    )
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
        data = pickle.dumps(tuple(known))
        done = subprocess.run([sys.executable, "-c", program], input=data, env=environment, capture_output=True)
        assert done.stdout.split() == [b"3", b"4"], done.stderr.decode()
