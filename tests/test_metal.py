"""What only the emulator sees of the Metal backend: how it uses the GPU, and that it cannot fail
silently. Its values and gradients are held to the reference by the shared suite.
"""

import os
import re
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jax_fused_lora import forms, lora_forward, lora_linear
from jax_fused_lora.implementations import Implementation, implementations

FLOAT = 4  # bytes


def apply(operands, implementation="metal", scaling=0.5):
    op = lora_linear if "kernel" in operands else lora_forward
    return op(**operands, scaling=scaling, implementation=implementation)


def run_forward(emulated, operands):
    """What the emulator counted for one forward call."""
    call = jax.jit(apply)
    emulated.reset_counters()
    jax.block_until_ready(call(operands))
    return emulated.counters()


def run_backward(emulated, operands, wanted=("x", "lora_a", "lora_b")):
    """What the emulator counted for one backward call, its forward call apart."""
    rest = {name: value for name, value in operands.items() if name not in wanted}
    y, vjp = jax.vjp(lambda some: apply(rest | some), {name: operands[name] for name in wanted})
    jax.block_until_ready(y)
    emulated.reset_counters()
    jax.block_until_ready(vjp(y))
    return emulated.counters()


def dispatched(counters):
    return {name: kernel["count"] for name, kernel in counters["kernels"].items()}


# ---- One command buffer a call, and few dispatches.


@pytest.mark.parametrize("rows", [1, 8, 9, 100])
def test_a_forward_call_with_w_is_two_dispatches(emulated, rows):
    counters = run_forward(emulated, oracle.operands((rows,), 40, 50, 4, "float32"))
    assert counters["command_buffers"] == 1
    few = {"shrink_rows": 1, "expand_rows": 1}
    assert dispatched(counters) == (few if rows <= 8 else {"shrink": 1, "gemm_expand": 1})


@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("rank", [4, 200])
def test_a_forward_call_without_w_is_one_dispatch(emulated, rows, rank):
    operands = oracle.operands((rows,), 40, 50, rank, "float32", kernel=False, bias=False)
    counters = run_forward(emulated, operands)
    assert counters["command_buffers"] == 1
    assert dispatched(counters) == {"lora_forward": 1}


@pytest.mark.parametrize("rows", [5, 100])
def test_a_backward_call_with_w_is_four_dispatches(emulated, rows):
    counters = run_backward(emulated, oracle.operands((rows,), 40, 50, 4, "float32"))
    assert counters["command_buffers"] == 1
    few = {"shrink_rows": 1, "expand_rows": 1}
    many = {"shrink": 1, "gemm_expand": 1}
    assert dispatched(counters) == (few if rows <= 8 else many) | {"grad": 2}


def test_a_backward_call_without_w_is_three_dispatches(emulated):
    operands = oracle.operands((100,), 40, 50, 4, "float32", kernel=False, bias=False)
    counters = run_backward(emulated, operands)
    assert counters["command_buffers"] == 1
    assert dispatched(counters) == {"lora_forward": 1, "grad": 2}


@pytest.mark.parametrize(
    ("wanted", "kernels"),
    [
        (("x",), {"shrink": 1, "gemm_expand": 1}),
        (("lora_a",), {"shrink": 1, "grad": 1}),
        (("lora_b",), {"grad": 1}),
    ],
    ids=str,
)
def test_what_nobody_asks_for_is_not_computed(emulated, wanted, kernels):
    operands = oracle.operands((20,), 40, 50, 4, "float32")
    assert dispatched(run_backward(emulated, operands, wanted)) == kernels


# ---- How often an operand is read.

M, K, N, R = 512, 1024, 1024, 16
TILE = 64


def test_traffic_of_a_forward_call(emulated):
    operands = oracle.operands((M,), K, N, R, "float32")
    counters = run_forward(emulated, operands)
    shrink = counters["kernels"]["shrink"]["traffic"]
    expand = counters["kernels"]["gemm_expand"]["traffic"]
    x, w, y, h = M * K * FLOAT, K * N * FLOAT, M * N * FLOAT, M * R * FLOAT
    assert shrink["x"] == {"read": x, "written": 0}
    assert shrink["h"] == {"read": 0, "written": h}
    assert shrink["lora_a"]["read"] == K * R * FLOAT * M // 32
    assert expand["x"]["read"] == x * N // TILE
    assert expand["kernel"]["read"] == w * M // TILE
    assert expand["y"] == {"read": 0, "written": y}
    assert expand["h"]["read"] == h * N // TILE
    assert expand["lora_b"]["read"] == R * N * FLOAT * M // TILE
    assert counters["traffic"]["x"]["read"] <= (1 + N // TILE) * x
    # Beside operands and result there are h, and the sizes ("bytes").
    assert set(counters["traffic"]) == set(oracle.NAMES) | {"h", "y", "bytes"}


def test_traffic_of_a_backward_call(emulated):
    operands = oracle.operands((M,), K, N, R, "float32", bias=False)
    counters = run_backward(emulated, operands)
    traffic = {name: kernel["traffic"] for name, kernel in counters["kernels"].items()}
    x, g, t = M * K * FLOAT, M * N * FLOAT, M * R * FLOAT
    assert traffic["shrink"]["g"]["read"] == g
    assert traffic["shrink"]["t"] == {"read": 0, "written": t}
    assert traffic["grad"]["x"]["read"] == x
    assert traffic["grad"]["g"]["read"] == g
    assert traffic["grad"]["da"] == {"read": 0, "written": K * R * FLOAT}
    assert traffic["grad"]["db"] == {"read": 0, "written": R * N * FLOAT}
    assert traffic["gemm_expand"]["g"]["read"] == g * K // TILE
    assert traffic["gemm_expand"]["dx"] == {"read": 0, "written": x}
    names = set(oracle.NAMES) - {"bias"} | {"g", "h", "t", "dx", "da", "db", "bytes"}
    assert set(counters["traffic"]) == names


def test_traffic_without_w(emulated):
    operands = oracle.operands((M,), K, N, R, "float32", kernel=False, bias=False)
    traffic = run_forward(emulated, operands)["traffic"]
    assert traffic["x"] == {"read": M * K * FLOAT, "written": 0}
    assert traffic["h"] == {"read": 0, "written": M * R * FLOAT}
    assert traffic["y"] == {"read": 0, "written": M * N * FLOAT}
    assert traffic["lora_b"]["read"] == R * N * FLOAT * M // 32


def test_few_rows_read_w_once(emulated):
    operands = oracle.operands((8,), 300, 200, R, "float32", bias=False)
    w = 300 * 200 * FLOAT
    assert run_forward(emulated, operands)["traffic"]["kernel"]["read"] == w
    assert run_backward(emulated, operands)["traffic"]["kernel"]["read"] == w


def test_no_temporary_is_larger_than_rows_times_rank(emulated):
    """Read from the program: the calls' results are those of the op, h, and t as workspace."""
    operands = oracle.operands((50,), 40, 60, 4, "float32", bias=False)
    text = jax.jit(jax.value_and_grad(lambda o: apply(o).sum())).lower(operands).as_text()
    found = {
        call: re.findall(r"tensor<([\dx]*)xf32>", results)
        for call, results in re.findall(r"@jax_fused_lora\.metal\.(\w+)\(.* -> \((.*)\)", text)
    }
    assert found["lora_forward"] == ["50x60", "50x4", "0"]
    assert found["lora_backward"] == ["50x40", "40x4", "4x60", "200"]


# ---- Memory: wrapped or copied, and given back.


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_operands_that_cannot_be_wrapped_are_copied(emulated, monkeypatch, rows, dtype):
    monkeypatch.setenv("METAL_EMULATOR_NO_WRAP", "1")
    operands = oracle.operands((rows,), 67, 45, 5, dtype)
    g = oracle.operands((rows,), 45, 1, 1, dtype, seed=1)["x"]
    y, vjp = jax.vjp(apply, operands)
    expected = oracle.truth(operands, g, 0.5)
    oracle.check("y", y, expected["y"], dtype)
    for name, grad in vjp(g)[0].items():
        oracle.check(name, grad, expected[name], dtype)


@pytest.mark.parametrize("wrap", [True, False], ids=["wrapped", "copied"])
def test_ten_thousand_calls_leave_nothing_behind(emulated, monkeypatch, wrap):
    if not wrap:
        monkeypatch.setenv("METAL_EMULATOR_NO_WRAP", "1")
    operands = oracle.operands((1,), 4, 4, 1, "float32", kernel=False, bias=False)
    call = jax.jit(apply)

    def calls(count):
        for _ in range(count):
            y = call(operands)
        y.block_until_ready()
        # The last command buffer is released just after it has fulfilled the last future.
        for _ in range(100):
            if not emulated.counters()["live"].get("MTLCommandBuffer"):
                break
            time.sleep(0.01)
        return emulated.counters()["live"], resource.getrusage(
            resource.RUSAGE_SELF
        ).ru_maxrss  # kilobytes

    before, memory = calls(500)
    after, memory_after = calls(10_000)
    assert after["MTLBuffer"] == after["MTLCommandBuffer"] == after["MTLComputeCommandEncoder"] == 0
    assert after == before
    assert memory_after - memory < 8 * 1024


def test_calls_from_many_threads(emulated):
    """Other dtypes and kernels in each, so that pipelines are made while others run."""
    cases = [
        (rows, dtype, kernel)
        for rows in (2, 30)
        for dtype in oracle.DTYPES
        for kernel in (True, False)
    ]

    def check(case):
        rows, dtype, kernel = case
        operands = oracle.operands((rows,), 33, 27, 3, dtype, kernel=kernel, bias=kernel)
        y = jax.jit(apply)(operands)
        oracle.check("y", y, oracle.truth(operands, y, 0.5)["y"], dtype)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check, cases * 3))


# ---- Failures.


@pytest.mark.parametrize("kernel", [True, False], ids=["linear", "forward"])
def test_a_command_buffer_that_fails_is_an_error_in_metals_words(emulated, monkeypatch, kernel):
    operands = oracle.operands((20,), 33, 27, 3, "float32", kernel=kernel, bias=kernel)
    call = jax.jit(apply)
    right = call(operands)
    monkeypatch.setenv("METAL_EMULATOR_FAIL", "Caused GPU Hang Error (00000003)")
    # JAX makes a ValueError of an error that comes after the call has returned.
    failure = (jax.errors.JaxRuntimeError, ValueError)
    with pytest.raises(failure, match=r"lora_forward on Metal: .*GPU Hang"):
        call(operands).block_until_ready()
    monkeypatch.delenv("METAL_EMULATOR_FAIL")
    assert bool((call(operands) == right).all())  # and the next call works


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("METAL_EMULATOR_NO_DEVICE", "1", "this machine has no Metal device"),
        ("METAL_EMULATOR_SOURCE", "nonsense;", "the shaders do not compile: "),
    ],
)
def test_a_machine_that_cannot_run_it_says_why_and_goes_on(
    emulated, tmp_path, variable, value, reason
):
    if variable == "METAL_EMULATOR_SOURCE":
        (tmp_path / "shaders.metal").write_text(value)
        value = str(tmp_path / "shaders.metal")
    code = f"""
import emulator
emulator.load(emulator.BUILD / emulator.LIBRARY)
import jax, jax.numpy as jnp
from jax_fused_lora import implementations, lora_linear
metal = implementations()["metal"]
assert not metal.available
assert {reason!r} in metal.reason, metal.reason
call = jax.jit(lora_linear).lower(*(jnp.ones(s) for s in [(3, 4), (4, 5), (4, 2), (2, 5)]))
assert "jax_fused_lora.cpu.lora_forward" in call.as_text()
print("goes on")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ
        | {"JAX_FUSED_LORA_METAL": "always", "PYTHONPATH": str(Path(emulated.__file__).parent)}
        | {variable: value},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.stdout == "goes on\n", done.stdout + done.stderr


# ---- The choice between Metal and the C++ kernels.


def lowered(rows, width=64, implementation=None):
    shapes = {
        "x": (rows, width),
        "kernel": (width,) * 2,
        "lora_a": (width, 4),
        "lora_b": (4, width),
    }
    arguments = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
    call = jax.jit(lambda o: apply(o, implementation))
    return call.lower(arguments).as_text()


@pytest.mark.parametrize(
    ("setting", "small", "large"),
    [("auto", "cpu", "metal"), ("always", "metal", "metal"), ("never", "cpu", "cpu")],
)
def test_the_environment_decides_what_metal_gets(emulated, monkeypatch, setting, small, large):
    monkeypatch.setenv("JAX_FUSED_LORA_METAL", setting)
    assert f"jax_fused_lora.{small}.lora_forward" in lowered(1)
    # Enough work for a command buffer, and a form that the C++ kernels serve too.
    assert f"jax_fused_lora.{large}.lora_forward" in lowered(4096, 2048)
    for name in ("cpu", "metal"):
        assert f"jax_fused_lora.{name}.lora_forward" in lowered(1, implementation=name)


def test_the_default_is_auto(emulated, monkeypatch):
    monkeypatch.delenv("JAX_FUSED_LORA_METAL")
    assert "jax_fused_lora.metal" in lowered(4096, 2048)
    assert "jax_fused_lora.metal" not in lowered(1)


def test_another_setting_is_an_error(monkeypatch):
    monkeypatch.setenv("JAX_FUSED_LORA_METAL", "sometimes")
    with pytest.raises(ValueError, match="JAX_FUSED_LORA_METAL is 'sometimes', needed 'auto', 'al"):
        lowered(1)


def test_the_rule(monkeypatch):
    monkeypatch.setenv("JAX_FUSED_LORA_METAL", "auto")

    def best(available, rows, rank=16, has_kernel=True):
        problem = forms.Problem(rows, 4096, 4096, rank, "float32", has_kernel)
        return forms.best_library(available, problem)

    both = ("cpu", "metal")
    assert best(both, 1) == "cpu"
    assert best(both, 512) == "metal"
    assert best(both, 512, rank=257) == "cpu"  # more than Metal serves
    assert best(both, 64, has_kernel=False) == "cpu"
    assert best(both, 8192, has_kernel=False) == "metal"
    assert best(("cpu",), 8192) == "cpu"
    assert best(("metal",), 8192) == "metal"
    assert best(("metal",), 1) is None
    assert best((), 8192) is None


def test_it_serves_jaxs_cpu_platform(emulated):
    metal = implementations()["metal"]
    assert metal == Implementation(True, "cpu", metal.reason)
    assert metal.reason.startswith("native code on ")


@pytest.mark.parametrize("platform", ["METAL", "mps"])
def test_jaxs_own_apple_platforms_get_the_definition(platform):
    """jax-metal and jax-mps take no custom call."""

    def lower(implementation):
        shapes = [(3, 8), (8, 6), (8, 2), (2, 6)]
        arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        layer = jax.jit(lambda *o: lora_linear(*o, implementation=implementation))
        return layer.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()

    assert "dot_general" in lower(None)
    assert "custom_call" not in lower(None)
    assert platform in implementations()["xla"].reason
    if implementations()["metal"].available:
        with pytest.raises(ValueError, match="'metal' serves platform 'cpu'"):
            lower("metal")


def test_the_emulated_gpu_reports_what_it_ran(emulated):
    """So that no test above can pass without having run."""
    emulated.reset_counters()
    assert emulated.counters()["dispatches"] == 0
    y = apply(oracle.operands((3,), 5, 7, 2, "float32"))
    assert np.isfinite(y).all()
    assert emulated.counters()["dispatches"] == 2
