import os
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS / "metal_emulator")]  # oracle.py, programs.py, emulator.py

import emulator  # noqa: E402

# The Metal backend runs emulated where the emulator can be built: on Linux, with the packages that
# `make test` installs. It must be loaded before the package looks for it.
if sys.platform != "linux":
    NO_EMULATOR = "the emulator is for Linux"
elif os.environ.get("METAL_EMULATOR_LIBRARY") == "none":
    NO_EMULATOR = "METAL_EMULATOR_LIBRARY is none"
else:
    try:
        emulator.load(emulator.build())
        NO_EMULATOR = ""
    except emulator.CannotBuild as error:
        if os.environ.get("CI"):
            raise
        NO_EMULATOR = str(error)
# Emulated, Metal is slow: it takes what it is named for, not what a rule sends it.
os.environ.setdefault("JAX_FUSED_LORA_METAL", "never")

import jax  # noqa: E402

from jax_fused_lora import implementations  # noqa: E402

# Meshes of eight devices, on one CPU.
jax.config.update("jax_num_cpu_devices", 8)

# On GPUs JAX multiplies float32 in TF32 unless it is told not to; the tests ask for float32.
if jax.default_backend() == "gpu":
    jax.config.update("jax_default_matmul_precision", "highest")

SEEDS = (1, 2, 3)  # orders of the emulated GPU's threads
AVAILABLE = [name for name, each in implementations().items() if each.available]
NATIVE = [name for name in AVAILABLE if name != "xla"]


def pytest_report_header():
    return f"Metal is not tested: {NO_EMULATOR}" if NO_EMULATOR else "Metal runs emulated"


def _with_seeds(names):
    emulated = "metal" in names and not NO_EMULATOR
    return [
        pytest.param((name, seed), id=f"{name}-{seed}" if seed else name)
        for name in names
        for seed in (SEEDS if emulated and name == "metal" else (0,))
    ]


def pytest_collection_modifyitems(items):
    """Where kernels are not what is tested, an emulated GPU has one order of its threads."""

    def another_order(item):
        params = item.callspec.params.values() if hasattr(item, "callspec") else ()
        return any(isinstance(p, tuple) and p[:1] == ("metal",) and p[1] > 1 for p in params)

    kernels = ("test_ops", "test_batch_axis")
    items[:] = [item for item in items if item.path.stem in kernels or not another_order(item)]


def _use(param):
    name, seed = param
    if seed:
        emulator.seed(seed)
    return name


@pytest.fixture(scope="session", params=_with_seeds(AVAILABLE))
def implementation(request):
    """Each available implementation in turn; an emulated GPU in several orders of its threads."""
    return _use(request.param)


@pytest.fixture(scope="session", params=_with_seeds(NATIVE))
def native(request):
    """As `implementation`, without "xla"."""
    return _use(request.param)


@pytest.fixture(scope="session")
def emulated():
    """The emulator, for tests of what only it can see."""
    if NO_EMULATOR:
        pytest.skip(NO_EMULATOR)
    return emulator


@pytest.fixture(params=["linear", "forward"])
def linear(request):
    """Whether the op under test is lora_linear with a bias, or lora_forward."""
    return request.param == "linear"
