"""The emulator itself, by small shaders, right ones and wrong ones: the tests of runtime_test."""

import os
import subprocess
import sys

import emulator
import pytest

TEST = emulator.BUILD / "runtime_test"  # built with the rest
NAMES = []
if TEST.exists():
    NAMES = subprocess.check_output([TEST, "--list"], encoding="utf-8").split()


@pytest.mark.parametrize("name", NAMES)
def test_runtime(emulated, name):
    done = subprocess.run(
        [TEST, name],
        env=os.environ | {"METAL_EMULATOR_PYTHON": sys.executable},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout + done.stderr
