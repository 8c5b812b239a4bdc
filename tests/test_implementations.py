"""Which implementations there are, what happens where one is missing, and what may be loaded.

Each test of loading runs in a process of its own: a target once registered cannot be taken back.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax_fused_lora._cpu
import pytest

import jax_fused_lora
from jax_fused_lora import Implementation, implementations
from jax_fused_lora.implementations import load, running_ffi_api_version

NATIVE = Path(jax_fused_lora._cpu.__file__)

# A layer and its gradients, by an implementation and by XLA.
COMPARE = """
import jax, jax.numpy as jnp, numpy as np
from jax_fused_lora import implementations, lora_linear

def run(implementation, rows, dtype):
    rng = np.random.default_rng(0)
    shapes = {"x": (rows, 40), "kernel": (40, 56), "lora_a": (40, 4), "lora_b": (4, 56)}
    operands = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
    loss = lambda operands: lora_linear(
        **operands, scaling=0.5, implementation=implementation).astype("float32").sum()
    return jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(operands))

def compare(implementation):
    for rows in (1, 5, 300):
        for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 2e-2)):
            for a, b in zip(run(implementation, rows, dtype), run("xla", rows, dtype), strict=True):
                a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
                assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), (rows, dtype)
"""


def python(code, *arguments, interpreter=sys.executable, **environment):
    """What a fresh interpreter prints, which must be all it says."""
    done = subprocess.run(
        [interpreter, "-P", "-c", code, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    return done.stdout


def test_every_implementation_is_listed():
    known = implementations()
    assert list(known) == ["cpu", "metal", "cuda", "xla"]
    for name, each in known.items():
        assert isinstance(each, Implementation)
        assert isinstance(each.available, bool)
        assert each.platform in ("cpu", "cuda", "any")
        assert each.reason, f"{name} gives no reason"
    assert known["cpu"].available, known["cpu"].reason
    assert known["xla"] == Implementation(True, "any", known["xla"].reason)


def test_targets_are_loaded_once():
    library = load("cpu")
    assert library is load("cpu")
    assert library.targets == {
        "lora_forward": "jax_fused_lora.cpu.lora_forward",
        "lora_backward": "jax_fused_lora.cpu.lora_backward",
    }


def test_what_does_not_exist_is_missing_with_a_reason():
    library = load("abacus")
    assert not library.implementation.available
    assert "jax_fused_lora._abacus cannot be loaded" in library.implementation.reason
    assert not library.targets


def test_import_is_quiet_and_leaves_flax_alone():
    """Flax takes a second to import, and a user without it is a user too."""
    code = "import jax_fused_lora, sys; assert not {'flax', 'optax', 'rich'} & set(sys.modules)"
    assert python(code) == ""


# ---- Without the native library.

WITHOUT_NATIVE = "import sys; sys.modules['jax_fused_lora._cpu'] = None\n" + COMPARE


def test_without_the_native_library_xla_computes_the_same():
    code = """
cpu = implementations()["cpu"]
assert not cpu.available
assert "jax_fused_lora._cpu cannot be loaded" in cpu.reason
compare(None)
assert "custom_call" not in jax.jit(lambda x, w, a, b: lora_linear(x, w, a, b)).lower(
    jnp.ones((3, 4)), jnp.ones((4, 5)), jnp.ones((4, 2)), jnp.ones((2, 5))).as_text()
print("same")
"""
    assert python(WITHOUT_NATIVE + code) == "same\n"


def test_without_the_native_library_its_name_raises_the_reason():
    code = """
try:
    run("cpu", 3, "float32")
except ValueError as error:
    assert implementations()["cpu"].reason in str(error), error
    print("refused")
"""
    assert python(WITHOUT_NATIVE + code) == "refused\n"


# ---- One build for old and new jax.


# Loads the library and lets it say that it was built for another FFI API.
FOREIGN = """
import importlib.util, sys
major, minor = int(sys.argv[2]), int(sys.argv[3])
spec = importlib.util.spec_from_file_location("jax_fused_lora._cpu", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.ffi_api_version = lambda: (major, minor)
registered = []
registrations = module.registrations
module.registrations = lambda: registered.append(1) or registrations()
sys.modules["jax_fused_lora._cpu"] = module
"""


@pytest.mark.parametrize(("major", "minor"), [(0, 99), (1, 0)], ids=str)
def test_a_library_of_a_newer_ffi_is_not_registered(major, minor):
    """Registered, it would break the whole backend: every later JAX call would fail."""
    code = """
cpu = implementations()["cpu"]
assert not cpu.available
assert f"built for XLA FFI {major}.{minor}, jaxlib " in cpu.reason, cpu.reason
assert "reinstall" in cpu.reason
assert not registered
assert float(jnp.ones(3).sum()) == 3
compare(None)
print("works")
"""
    assert python(FOREIGN + COMPARE + code, NATIVE, major, minor) == "works\n"


def test_a_library_of_an_older_ffi_is_used():
    code = """
assert implementations()["cpu"].available
assert registered
compare("cpu")
print("works")
"""
    assert python(FOREIGN + COMPARE + code, NATIVE, 0, 1) == "works\n"


def test_a_jaxlib_without_headers_is_not_trusted(monkeypatch, tmp_path):
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    assert running_ffi_api_version() is None
    implementation = load.__wrapped__("cpu").implementation
    assert not implementation.available
    assert "an unknown version" in implementation.reason


def test_the_library_is_built_for_the_oldest_supported_jaxlib():
    """Whatever jaxlib runs: jaxlib 0.10.0's headers, and only those, make a build for them all."""
    assert tuple(jax_fused_lora._cpu.ffi_api_version()) == (0, 3)
    assert running_ffi_api_version() >= (0, 3)


def test_the_library_runs_on_the_oldest_supported_jax(tmp_path):
    """The very file that runs here, beside jax 0.10.0."""
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    interpreter = environment / "bin" / "python"
    installed = subprocess.run(
        [
            *(interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *("jax==0.10.0", "jaxlib==0.10.0", "numpy", "rich"),
        ],
        capture_output=True,
        encoding="utf-8",
    )
    assert installed.returncode == 0, installed.stderr

    package = tmp_path / "site" / "jax_fused_lora"
    package.mkdir(parents=True)
    for file in Path(jax_fused_lora.__file__).parent.glob("*.py"):
        shutil.copy(file, package)
    for file in [NATIVE, *NATIVE.parent.glob("libhwy*.so*")]:
        shutil.copy(file, package)
    code = """
assert jax.__version__ == "0.10.0"
assert implementations()["cpu"].available, implementations()["cpu"].reason
compare("cpu")
print("same")
"""
    assert python(COMPARE + code, interpreter=interpreter, PYTHONPATH=str(package.parent)) == (
        "same\n"
    )


def test_a_platform_without_native_code_gets_the_definition_or_an_error():
    def lower(implementation):
        def layer(x, w, a, b):
            return jax_fused_lora.lora_linear(x, w, a, b, implementation=implementation)

        shapes = [(3, 8), (8, 6), (8, 2), (2, 6)]
        arguments = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
        return jax.jit(layer).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()

    text = lower(None)
    assert "dot_general" in text
    assert "jax_fused_lora.cpu" not in text
    with pytest.raises(ValueError, match="'cpu' serves platform 'cpu'"):
        lower("cpu")
