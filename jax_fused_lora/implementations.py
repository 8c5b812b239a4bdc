"""Which native libraries loaded, which platform each serves, and why one is missing."""

import dataclasses
import functools
import importlib
import importlib.util
import os
import pathlib
import platform
import re
import sys
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way of computing the ops.

    Attributes:
        available: whether it can be named in `implementation=`.
        platform: the JAX platform it serves, or "any".
        reason: what it runs on, or why it is missing and what to do about it.
    """

    available: bool
    platform: str
    reason: str


def usable_cores() -> int:
    """The cores that this process may use, for each of which XLA's CPU client has a thread."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_XLA_REASON = (
    "the same mathematics in jax.numpy, compiled by XLA; also what platforms that take no custom "
    "call get, as METAL (jax-metal) and mps (jax-mps) do"
)

# The JAX platform that each native library serves. An Apple GPU shares the CPU's memory, and the
# JAX platforms made for it take no custom call: its way into JAX is the CPU platform.
_SERVES = {"cpu": "cpu", "metal": "cpu", "cuda": "cuda"}


def implementations() -> dict[str, Implementation]:
    """All implementations by name, the missing ones too.

    Returns:
        `{"cpu": ..., "metal": ..., "cuda": ..., "xla": ...}`. The names are those that the ops
        take as `implementation=`.
    """
    return {
        "cpu": load("cpu").implementation,
        "metal": load("metal").implementation,
        "cuda": load("cuda").implementation,
        "xla": Implementation(True, "any", _XLA_REASON),
    }


@dataclasses.dataclass(frozen=True)
class Library:
    """A native library: its custom-call targets, registered with XLA, if it is available.

    Attributes:
        implementation: what the user sees of it.
        targets: the name that each call is registered under.
        product: whether it multiplies x·W of many rows itself, where that is a matter of hardware.
        workspace: the floats of workspace that a call needs, from its sizes m, k, n, rank, its
            form and its grads ("" for `lora_forward`); a GPU's only.
    """

    implementation: Implementation
    targets: dict[str, str]
    product: bool = False
    workspace: Callable[..., int] = lambda *_: 0


@functools.cache
def load(name: str) -> Library:
    """Loads a native library and registers its targets, once.

    Never raises: what goes wrong becomes the implementation's `reason`.
    """
    module_name = f"jax_fused_lora._{name}"
    try:
        module: Any = importlib.import_module(module_name)
    except ImportError as error:
        if name == "metal" and (sys.platform, platform.machine()) != ("darwin", "arm64"):
            return _missing(
                name,
                "an Apple GPU is in Macs with Apple silicon, and this machine is "
                f"{platform.system()} on {platform.machine()}",
            )
        if name == "cuda" and importlib.util.find_spec(module_name) is None:
            return _missing(
                name,
                "this installation was built without it; with CUDA's nvcc at hand: "
                "pip install . -C cmake.define.JAX_FUSED_LORA_CUDA=ON",
            )
        return _missing(
            name,
            f"the native library {module_name} cannot be loaded ({error}); it is built by "
            f"`pip install .`, which a source folder on sys.path hides: this package was imported "
            f"from {pathlib.Path(__file__).parent}",
        )
    # Registering a target that was built with newer FFI headers than the running jaxlib's breaks
    # the whole backend ("Unable to initialize backend 'cpu'"), so look before registering.
    built, running = tuple(module.ffi_api_version()), running_ffi_api_version()
    if running is None or built[0] != running[0] or built > running:
        have = "an unknown version" if running is None else "{}.{}".format(*running)
        return _missing(
            name,
            "the native library was built for XLA FFI {}.{}, jaxlib {} has {}; ".format(
                *built, jax.lib.__version__, have
            )
            + "reinstall jax_fused_lora with `pip install --no-cache-dir` against a jaxlib no "
            "newer than this one",
        )
    try:
        runs = module.runs()
    except RuntimeError as error:  # the hardware is not there
        return _missing(name, str(error))
    serves, targets = _SERVES[name], {}
    for call, capsule in module.registrations().items():
        targets[call] = f"jax_fused_lora.{name}.{call}"
        xla_platform = {"cpu": "cpu", "cuda": "CUDA"}[serves]
        jax.ffi.register_ffi_target(targets[call], capsule, platform=xla_platform)
    found = Implementation(True, serves, f"native code on {runs}")
    return Library(found, targets, module.product(), module.workspace)


def default_platform() -> str:
    """The platform of JAX's default device, by the name that lowering and `Implementation` use."""
    backend = jax.default_backend()
    return "cuda" if backend == "gpu" and available_on("cuda") else backend


def available_on(serves: str) -> tuple[str, ...]:
    """The native libraries that serve a JAX platform here."""
    return tuple(
        name
        for name, served in _SERVES.items()
        if served == serves and load(name).implementation.available
    )


def running_ffi_api_version() -> tuple[int, int] | None:
    """The (major, minor) of the running jaxlib's FFI, read from the headers that come with it."""
    header = pathlib.Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h")
    try:
        text = header.read_text()
    except OSError:
        return None
    found = re.findall(r"#define XLA_FFI_API_(?:MAJOR|MINOR) (\d+)", text)
    return (int(found[0]), int(found[1])) if len(found) == 2 else None


def _missing(name: str, reason: str) -> Library:
    return Library(Implementation(False, _SERVES.get(name, name), reason), {})
