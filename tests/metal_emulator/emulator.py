"""The Metal backend on Linux: builds it with the emulator, loads it, asks the emulator's counters.

The package itself knows of no emulator: what is loaded here takes the place that the library of a
Mac would have, before the package is imported.
"""

import contextlib
import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
SHADERS = HERE.parents[1] / "shaders"
BUILD = HERE.parents[1] / "build" / f"metal_emulator-{sys.implementation.cache_tag}"
PACKAGES = "clang-16 gobjc++ libblocksruntime-dev libboost-context-dev libgnustep-base-dev"
LIBRARY = f"_metal{sysconfig.get_config_var('EXT_SUFFIX')}"
# A worker of pytest-xdist or a second run may build at the same time; the lock lets one do it.
LOCK = BUILD.with_suffix(".lock")


class CannotBuild(Exception):
    """Why there is no emulator here, for a person to read."""


def build() -> Path:
    """Builds the library where a source has changed, and returns it.

    METAL_EMULATOR_LIBRARY names one that was built otherwise, or "none".
    """
    given = os.environ.get("METAL_EMULATOR_LIBRARY")
    if given:
        return Path(given)
    for tool in ("gnustep-config", "gcc"):
        if shutil.which(tool) is None:
            raise CannotBuild(f"{tool} is missing; on Debian: apt-get install {PACKAGES}")
    scripts = sysconfig.get_path("scripts")
    environment = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    nanobind = _output([sys.executable, "-m", "nanobind", "--cmake_dir"])
    with _locked():
        _output(
            [
                *("cmake", "-S", HERE, "-B", BUILD, "-G", "Ninja"),
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dnanobind_DIR={nanobind.strip()}",
            ],
            environment,
        )
        _output(["cmake", "--build", BUILD], environment)
    return BUILD / LIBRARY


def _output(command: list, environment: dict | None = None) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    if done.returncode != 0:
        raise CannotBuild(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


@contextlib.contextmanager
def _locked():
    import fcntl

    LOCK.parent.mkdir(parents=True, exist_ok=True)
    with LOCK.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def load(library: Path) -> None:
    """Puts the library where the package looks for the Metal backend of a Mac."""
    name = "jax_fused_lora._metal"
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def _runtime() -> ctypes.CDLL:
    return ctypes.CDLL(sys.modules["jax_fused_lora._metal"].__file__)


def seed(value: int) -> None:
    """Sets the order in which threads run."""
    _runtime().metal_emulator_seed(ctypes.c_uint64(value))


def reset_counters() -> None:
    _runtime().metal_emulator_reset_counters()


def counters() -> dict:
    """What has run since the last reset; see runtime.h."""
    function = _runtime().metal_emulator_counters
    function.restype = ctypes.c_char_p
    return json.loads(function())


def source() -> str:
    """The shaders as one text, as they are embedded in the library."""
    seen = set()

    def expand(file: Path) -> str:
        seen.add(file.name)
        lines = []
        for line in file.read_text().splitlines():
            include = re.fullmatch(r'#include "(.*)"', line)
            if include is None:
                lines.append(line)
            elif include[1] not in seen:
                lines.append(expand(SHADERS / include[1]))
        return "\n".join(line for line in lines if line != "#pragma once")

    return expand(SHADERS / "lora.metal")
