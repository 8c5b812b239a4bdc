"""Values and every gradient of both ops, for each implementation, against float64."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_fused_lora import forms, implementations, lora_forward, lora_linear, reference


def apply(operands, scaling=1.0, implementation=None):
    """lora_linear where there is a kernel, else lora_forward."""
    rest = {"scaling": scaling, "implementation": implementation}
    if "kernel" in operands:
        return lora_linear(**operands, **rest)
    return lora_forward(**operands, **rest)


def check_everything(operands, scaling, implementation, dtype):
    """y and the gradients of all operands, scaling given as a static number."""
    rows = operands["x"].shape[:-1]
    g = oracle.operands(rows, operands["lora_b"].shape[1], 1, 1, dtype, seed=1)["x"]

    @jax.jit
    def run(operands, g):
        y, vjp = jax.vjp(lambda o: apply(o, scaling, implementation), operands)
        return y, vjp(g)[0]

    y, grads = run(operands, g)
    expected = oracle.truth(operands, g, scaling)
    oracle.check("y", y, expected["y"], dtype)
    for name, grad in grads.items():
        terms = name == "x" and implementation == "xla"
        oracle.check(f"gradient of {name}", grad, expected[name], dtype, terms=terms)


def test_cpu_is_available():
    assert implementations()["cpu"].available, implementations()["cpu"].reason


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("kernel", [True, False], ids=["linear", "forward"])
@pytest.mark.parametrize("rank", [1, 4, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("rows", [1, 3, 63])
def test_ranks(implementation, rank, rows, kernel, dtype):
    operands = oracle.operands((rows,), 60, 77, rank, dtype, kernel=kernel, bias=kernel)
    check_everything(operands, 0.75, implementation, dtype)


# Rows, in, out, rank: powers of two, sizes that divide nothing, 0 and 1, both sides of every
# limit where another kernel takes over (4 rows, 64 rows, depth 512, panels of 64), few rows that
# two threads share, and without W what CUDA has kernels for (ranks 8 to 64, multiples of 64 and of
# 4, tiles of 4 and 16 rows that are not full). Products of more than one block are
# test_batch_axis's.
SHAPES = [
    (1, 1, 1, 1),
    (0, 5, 7, 3),
    (2, 0, 5, 2),
    (2, 5, 0, 2),
    (5, 0, 9, 3),
    (70, 0, 9, 3),
    (70, 0, 8, 8),
    (70, 8, 0, 8),
    (5, 7, 0, 2),
    (1, 1, 300, 2),
    (1, 300, 1, 2),
    (4, 513, 65, 7),
    (5, 513, 65, 7),
    (64, 100, 130, 12),
    (17, 700, 500, 70),
    (65, 512, 64, 256),
    (100, 1025, 67, 5),
    (257, 129, 190, 20),
    (1, 2048, 2100, 8),
    (3, 600, 4200, 13),
    (700, 64, 48, 16),
    (1, 320, 128, 32),
    (9, 132, 260, 16),
    (17, 64, 320, 8),
    (40, 576, 128, 16),
    (33, 128, 192, 64),
    (500, 384, 128, 16),
    (1100, 128, 256, 8),
    (4300, 128, 128, 8),
]


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("kernel", [True, False], ids=["linear", "forward"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(implementation, shape, kernel, dtype):
    rows, k, n, rank = shape
    operands = oracle.operands((rows,), k, n, rank, dtype, kernel=kernel, bias=kernel)
    check_everything(operands, -1.5, implementation, dtype)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] > 64], ids=str)
def test_forms_of_a_cpu_without_avx512(shape, dtype, monkeypatch):
    """Many rows complete XLA's product there, which the rule may never choose on this machine."""
    monkeypatch.setattr(forms, "_cpu_flags", frozenset)
    rows, k, n, rank = shape
    operands = oracle.operands((rows,), k, n, rank, dtype, bias=True)
    check_everything(operands, -1.5, "cpu", dtype)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 80),
    k=st.integers(0, 90),
    n=st.integers(0, 150),
    rank=st.integers(1, 40),
    kernel=st.booleans(),
    dtype=st.sampled_from(oracle.DTYPES),
    seed=st.integers(0, 100),
)
def test_any_shape(native, rows, k, n, rank, kernel, dtype, seed):
    operands = oracle.operands((rows,), k, n, rank, dtype, kernel=kernel, bias=kernel, seed=seed)
    check_everything(operands, 2.0, native, dtype)


@pytest.mark.parametrize("rows", [(), (3,), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("kernel", [True, False], ids=["linear", "forward"])
def test_leading_axes(implementation, rows, kernel):
    operands = oracle.operands(rows, 24, 40, 4, "float32", kernel=kernel, bias=kernel)
    check_everything(operands, 2.0, implementation, "float32")


def test_zero_features_keep_leading_axes(implementation):
    operands = oracle.operands((2, 3), 0, 5, 2, "float32")
    check_everything(operands, 1.0, implementation, "float32")


def test_transposed_and_sliced_operands(implementation):
    """Inside jit an operand may be any view that XLA did not need to materialize before."""
    big = oracle.operands((50,), 70, 90, 12, "float32", bias=False)

    def views(o):
        return {
            "x": o["x"].T[:40, 3:20].T,  # (17, 40)
            "lora_a": o["lora_a"][10:50, ::2],  # (40, 6)
            "lora_b": o["kernel"].T[:6, 5:60],  # (6, 55)
            "kernel": o["kernel"][:40, 33:88],  # (40, 55)
        }

    result = jax.jit(lambda o: apply(views(o), 1.5, implementation))(big)
    g = jnp.ones_like(result)
    expected = oracle.truth(views(big), g, 1.5)
    oracle.check("y", result, expected["y"], "float32")


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("kernel", [True, False], ids=["linear", "forward"])
@pytest.mark.parametrize("rows", [3, 40, 200])
def test_results_overwrite_poisoned_buffers(native, rows, kernel, dtype):
    """Results are written into donated buffers of NaN: an entry left out shows.

    XLA may place a result elsewhere; the addresses are compared, so that the test cannot pass
    without having tested.
    """
    operands = oracle.operands((rows,), 67, 67, 5, dtype, kernel=kernel, bias=False)
    g = oracle.operands((rows,), 67, 67, 5, dtype, seed=1)["x"]
    wanted = {name: operands[name] for name in ("x", "lora_a", "lora_b")}
    poison = jax.tree.map(lambda v: jnp.full_like(v, jnp.nan), {"y": g, **wanted})
    addresses = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(poison)}

    def run(poison, wanted, rest, g):
        y, vjp = jax.vjp(lambda w: apply({**w, **rest}, 2.0, native), wanted)
        return {"y": y, **vjp(g)[0]}

    rest = {name: v for name, v in operands.items() if name not in wanted}
    results = jax.jit(run, donate_argnums=0, keep_unused=True)(poison, wanted, rest, g)
    assert {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(results)} == addresses
    expected = oracle.truth(operands, g, 2.0)
    for name, result in results.items():
        oracle.check(name, result, expected[name], dtype)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("kernel", [True, False], ids=["linear", "forward"])
@pytest.mark.parametrize("rows", [1, 100])
def test_traced_scaling(implementation, rows, kernel, dtype):
    """0.3 has no short binary expansion: folded into B in 16 bits it would cost B's low bits."""
    operands = oracle.operands((rows,), 40, 56, 6, dtype, kernel=kernel, bias=kernel)
    g = oracle.operands((rows,), 56, 1, 1, dtype, seed=1)["x"]
    scaling = jnp.float32(0.3)

    @jax.jit
    def run(operands, scaling, g):
        y, vjp = jax.vjp(lambda o, s: apply(o, s, implementation), operands, scaling)
        return y, *vjp(g)

    y, grads, d_scaling = run(operands, scaling, g)
    expected = oracle.truth(operands, g, float(scaling))
    oracle.check("y", y, expected["y"], dtype)
    oracle.check("gradient of scaling", d_scaling, expected["scaling"], "float32")
    for name, grad in grads.items():
        terms = name == "x" and implementation == "xla"
        oracle.check(f"gradient of {name}", grad, expected[name], dtype, terms=terms)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kernel", [True, False], ids=["linear", "forward"])
@pytest.mark.parametrize(
    ("rows", "rank"), [((5,), 8), ((2, 7), 33), ((63,), 64), ((65,), 64), ((1,), 5), ((0,), 3)]
)
def test_the_definition_of_gpus_splits_h_and_t(rows, rank, kernel, dtype):
    """As right as the definition: a second rounding of h or t would break the bound."""
    operands = oracle.operands(rows, 300, 130, rank, dtype, kernel=kernel, bias=kernel)
    g = oracle.operands(rows, 130, 1, 1, dtype, seed=1)["x"]
    expected = oracle.truth(operands, g, 0.75)
    given = [operands.get(name) for name in ("x", "lora_a", "lora_b", "kernel", "bias")]
    y, h = jax.jit(partial(reference.forward, scaling=0.75, split=True))(*given)
    backward = jax.jit(partial(reference.backward, scaling=0.75, split=True))
    gradients = backward(g, *given[:3], h, given[3])
    for name, result in zip(("y", "x", "lora_a", "lora_b"), (y, *gradients), strict=True):
        oracle.check(name, result, expected[name], dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rows", [8, 9])
def test_a_split_h_may_be_infinite(rows, dtype):
    x, ones = jnp.ones((rows, 8), dtype), jnp.ones((8, 8), dtype)
    x = x.at[2].set(jnp.finfo(dtype).max if dtype == "bfloat16" else jnp.inf)
    y, _ = reference.forward(x, ones, ones, 2 * ones, scaling=1.0, split=True)
    assert (y[2] == jnp.inf).all()
    assert (jnp.delete(y, 2, 0) == 80).all()


@pytest.mark.parametrize("rows", [8, 9])
def test_a_split_h_of_any_size(rows):
    """h is float32: x·A of float16 may be much larger or smaller than what float16 holds."""
    rng = np.random.default_rng(0)
    sizes = 10.0 ** np.linspace(-7, 4, rows)
    x = jnp.asarray(rng.normal(size=(rows, 64)) * sizes[:, None], "float16")
    a = jnp.asarray(1e4 * rng.normal(size=(64, 8)), "float16")
    b = jnp.asarray(1e-6 * rng.normal(size=(8, 40)), "float16")
    w = jnp.zeros((64, 40), "float16")
    y, h = reference.forward(x, a, b, w, scaling=1e-2, split=True)
    assert np.abs(h).max() > 1e8
    whole, _ = reference.forward(x, a, b, w, scaling=1e-2)
    np.testing.assert_allclose(y, whole, rtol=1e-3, atol=2**-24)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rows", [(3,), (2, 20), (300,)], ids=str)
def test_gradients_of_factors_from_the_t_of_a_call(implementation, rows, dtype, monkeypatch):
    """On CUDA those of many rows are XLA's; here those of few are, too."""
    monkeypatch.setattr(forms, "_CUDA_GRADIENT_WORK", {"bfloat16": (0, 0), "float16": (0, 0)})
    operands = oracle.operands(rows, 64, 136, 24, dtype)
    check_everything(operands, 0.75, implementation, dtype)
    g = oracle.operands(rows, 136, 1, 1, dtype, seed=1)["x"]
    expected = oracle.truth(operands, g, 0.75)
    adapters = {name: operands.pop(name) for name in ("lora_a", "lora_b")}
    run = lambda a: apply({**operands, **a}, 0.75, implementation)  # noqa: E731
    without_x = jax.jit(lambda a, g: jax.vjp(run, a)[1](g)[0])(adapters, g)
    for name, grad in without_x.items():
        oracle.check(f"gradient of {name} alone", grad, expected[name], dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_split_t_of_any_size(rows, dtype):
    """t is float32: neither its sizes nor how far they are apart need fit a 16-bit type."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(rows, 20)), dtype)
    sizes = 10.0 ** np.array([-32, -25, -20, -8, 0, 5, 20, 34])
    t = (rng.normal(size=(rows, 8)) * sizes * 10.0 ** -rng.integers(0, 5, (rows, 8))).astype("f4")
    wide = np.asarray(x, np.float64)
    exact, bound = wide.T @ t, np.abs(wide).T @ np.abs(t)
    da = reference.gradient_of_a(x, jnp.asarray(t), jnp.float32, split=True)
    db = reference.gradient_of_b(x, jnp.asarray(t), jnp.float32, scaling=1.0, split=True)
    oracle.check("dA", da, (exact, bound), "float32")
    oracle.check("dB", db, (exact.T, bound.T), "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("special", [np.inf, np.nan])
def test_what_is_not_finite_in_a_split_t_stays_in_its_column(special, dtype):
    x, t = jnp.ones((40, 3), dtype), jnp.ones((40, 8)).at[7, 2].set(special)
    da = np.asarray(reference.gradient_of_a(x, t, jnp.float32, split=True))
    np.testing.assert_array_equal(da[:, 2], special)
    assert (np.delete(da, 2, 1) == 40).all()


@pytest.mark.parametrize("rank", [8, 16])
def test_gradient_of_b_in_the_sweep_for_t(implementation, rank):
    """On CUDA, beside a product of dx that lasts as long: of so many rows the smallest."""
    operands = oracle.operands((2, 150), 64, 2832, rank, "bfloat16")
    check_everything(operands, 0.75, implementation, "bfloat16")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_gpus_multiply_16_bits_by_16_bits(platform, dtype):
    operands = oracle.operands((16,), 24, 40, 8, dtype, bias=False)
    loss = jax.jit(jax.grad(lambda o: lora_linear(**o, scaling=2.0).astype(jnp.float32).sum()))
    text = loss.trace(operands).lower(lowering_platforms=(platform,)).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert len(dots) >= 5
    assert not [line for line in dots if line.count("xf32>") > 1]  # its result is one


def test_float64_is_computed_in_float64():
    with jax.enable_x64(True):
        operands = oracle.operands((5,), 20, 30, 4, "float64")
        check_everything(operands, 0.3, None, "float64")


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("kernel", [True, False], ids=["linear", "forward"])
def test_nothing_is_promoted_by_itself(implementation, kernel, dtype):
    operands = oracle.operands((4,), 16, 24, 2, dtype, kernel=kernel, bias=kernel)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        check_everything(operands, 0.75, implementation, dtype)


def test_integer_scaling_is_static(implementation):
    operands = oracle.operands((5,), 20, 30, 4, "float32")
    chex_equal = apply(operands, 2, implementation) == apply(operands, 2.0, implementation)
    assert bool(jnp.all(chex_equal))


def test_special_values_spread_as_in_the_definition(native):
    """An infinity or NaN in one row of x reaches that row of y and no other."""
    shapes = itertools.product((3, 70, 500), ((33, 47, 5), (128, 128, 8)), (True, False))
    for dtype, (rows, sizes, kernel) in itertools.product(oracle.DTYPES, shapes):
        operands = oracle.operands((rows,), *sizes, dtype, kernel=kernel, bias=False)
        operands["x"] = operands["x"].at[1, 7].set(jnp.nan)
        y = np.asarray(apply(operands, 1.0, native), np.float32)
        assert np.isnan(y[1]).all()
        assert np.isfinite(np.delete(y, 1, 0)).all()


def test_float16_overflows_to_infinity_and_keeps_subnormals(native):
    x = jnp.asarray([[60000.0], [2.0**-24]], jnp.float16)
    one = jnp.ones((1, 1), jnp.float16)
    y = lora_forward(x, one, one, scaling=2.0, implementation=native)
    assert y[0, 0] == jnp.inf
    assert y[1, 0] == 2.0**-23


def test_results_do_not_depend_on_the_run(native):
    """Threads take blocks in any order; sums are taken in one."""
    operands = oracle.operands((300,), 200, 210, 16, "float32")
    run = jax.jit(jax.grad(lambda o: (apply(o, 1.0, native) ** 2).sum()))
    first = run(operands)
    for _ in range(20):
        again = run(operands)
        assert all(bool((first[name] == again[name]).all()) for name in first)
