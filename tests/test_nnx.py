"""The Flax modules against Flax's own, which compute the same layer in several operations.

Ours round once, on the way out; Flax's round x·A, x·A·B, x·W and each sum. Results may therefore
differ by a few units in the last place of the largest entry: FEW of them.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from programs import inlined

from jax_fused_lora.nnx import LoRA, LoRALinear

F32, BF16 = jnp.float32, jnp.bfloat16
IN, OUT, RANK = 24, 40, 4
FEW = 8
NORMAL = nnx.initializers.normal(0.3)  # for B, or a fresh adapter would add nothing


def linear(cls, seed=0, **kwargs):
    options = {"lora_rank": RANK, "b_initializer": NORMAL, "bias_init": NORMAL} | kwargs
    return cls(IN, OUT, rngs=nnx.Rngs(seed), **options)


def adapter(cls, seed=0, **kwargs):
    return cls(IN, RANK, OUT, rngs=nnx.Rngs(seed), **({"b_initializer": NORMAL} | kwargs))


def inputs(dtype=F32, rows=(3, 5), seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(*rows, IN)), dtype)


def coarsest(*dtypes):
    """The unit in the last place, relative, of the coarsest dtype that takes part."""
    return max(float(jnp.finfo(dtype).eps) for dtype in dtypes)


def check_close(ours, theirs, eps):
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=FEW * eps * np.abs(b).max(initial=1e-30))


def check_same(ours, theirs, x, eps):
    """The same state, results, and gradients of every parameter and of x."""
    chex.assert_trees_all_equal(nnx.state(ours), nnx.state(theirs))

    def value_and_grads(model):
        def loss(model, x):
            y = model(x)
            return (y.astype(F32) ** 2).sum() / y.size, y

        (_, y), grads = nnx.jit(nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True))(model, x)
        return y, grads

    check_close(value_and_grads(ours), value_and_grads(theirs), eps)


def calls(model, x):
    """The program's custom calls and products: (lora_forward calls, dot_generals)."""
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    text = inlined(run.lower(state, x).as_text())
    return text.count("@jax_fused_lora.cpu.lora_forward("), text.count("stablehlo.dot_general")


def unfused(*args, **kwargs):
    """A product of one's own, such as a quantized one."""
    return lax.dot_general(*args, **kwargs)


# ---- Drop-ins.


@pytest.mark.parametrize("make", [linear, adapter])
def test_they_are_flax_modules(make):
    ours, theirs = (LoRALinear, nnx.LoRALinear) if make is linear else (LoRA, nnx.LoRA)
    model = make(ours)
    assert isinstance(model, theirs)
    lora = model.lora if make is linear else model
    assert isinstance(lora, nnx.LoRA)
    assert isinstance(lora.lora_a, nnx.LoRAParam)
    assert isinstance(lora.lora_b, nnx.LoRAParam)
    assert lora.lora_a.shape == (IN, RANK)
    assert lora.lora_b.shape == (RANK, OUT)


@pytest.mark.parametrize("seed", [0, 1])
def test_state_and_initial_parameters_are_flax_s(seed):
    for make, ours, theirs in ((linear, LoRALinear, nnx.LoRALinear), (adapter, LoRA, nnx.LoRA)):
        mine, other = nnx.state(make(ours, seed)), nnx.state(make(theirs, seed))
        assert jax.tree.structure(mine) == jax.tree.structure(other)
        chex.assert_trees_all_equal(mine, other)
    fresh = LoRALinear(IN, OUT, lora_rank=RANK, rngs=nnx.Rngs(seed))
    assert not fresh.lora.lora_b[...].any()  # B begins as zeros


@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    ("dtype", "param_dtype", "x_dtype"),
    [(None, F32, F32), (None, BF16, BF16), (None, F32, BF16), (BF16, F32, F32), (F32, BF16, BF16)],
    ids=str,
)
def test_lora_linear(dtype, param_dtype, x_dtype, use_bias):
    kwargs = {"dtype": dtype, "param_dtype": param_dtype, "lora_dtype": dtype,
              "lora_param_dtype": param_dtype, "use_bias": use_bias}  # fmt: skip
    ours, theirs = linear(LoRALinear, **kwargs), linear(nnx.LoRALinear, **kwargs)
    x = inputs(x_dtype)
    check_same(ours, theirs, x, coarsest(dtype or F32, param_dtype, x_dtype))
    assert calls(ours, x) == (1, 0)  # base, bias and adapter in one


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_lora_alone(dtype):
    ours, theirs = adapter(LoRA, param_dtype=dtype), adapter(nnx.LoRA, param_dtype=dtype)
    check_same(ours, theirs, inputs(dtype), coarsest(dtype))
    assert calls(ours, inputs(dtype)) == (1, 0)


@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no bias"])
def test_lora_around_a_linear(use_bias):
    base = nnx.Linear(IN, OUT, use_bias=use_bias, bias_init=NORMAL, rngs=nnx.Rngs(7))
    ours, theirs = adapter(LoRA, base_module=base), adapter(nnx.LoRA, base_module=base)
    check_same(ours, theirs, inputs(), coarsest(F32))
    assert calls(ours, inputs()) == (1, 0)


class Doubled(nnx.Linear):
    """A subclass with a forward pass of its own: to fuse its kernel would be to ignore that."""

    def __call__(self, x, *, factor=2.0):
        return factor * super().__call__(x)


def test_lora_around_any_callable():
    base = Doubled(IN, OUT, rngs=nnx.Rngs(7))
    ours, theirs = adapter(LoRA, base_module=base), adapter(nnx.LoRA, base_module=base)
    check_same(ours, theirs, inputs(), coarsest(F32))
    assert calls(ours, inputs()) == (1, 1)
    check_close(ours(inputs(), factor=5.0), theirs(inputs(), factor=5.0), coarsest(F32))


def test_an_adapter_of_one_s_own_inside():
    class Doubled(LoRA):
        def __call__(self, x):
            return 2 * super().__call__(x)

    x = inputs()
    for make in (Doubled, nnx.LoRA):
        layer = linear(LoRALinear)
        own = adapter(make, seed=3)
        layer.lora = own
        expected = nnx.Linear.__call__(layer, x) + own(x)
        np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_lora_around_what_cannot_be_called():
    model = adapter(LoRA, base_module=nnx.Dict())
    with pytest.raises(ValueError, match="base_module must be callable, got Dict"):
        model(inputs())


# ---- Where one call is not the same, the parts are computed one after the other.


@pytest.mark.parametrize(
    "kwargs",
    [
        {"dtype": BF16},
        {"lora_dtype": BF16},
        {"dtype": BF16, "lora_dtype": F32, "param_dtype": BF16},
        {"dot_general": unfused},
        {"precision": "highest"},
        {"preferred_element_type": F32},
        {"promote_dtype": lambda args, dtype: nnx.nn.dtypes.promote_dtype(args, dtype=BF16)},
        {"lora_promote_dtype": lambda args, dtype: nnx.nn.dtypes.promote_dtype(args, dtype=BF16)},
    ],
    ids=lambda kwargs: ",".join(kwargs),
)
def test_unfused(kwargs):
    ours, theirs = linear(LoRALinear, **kwargs), linear(nnx.LoRALinear, **kwargs)
    exact = {"dot_general", "precision", "preferred_element_type"} & set(kwargs)
    check_same(ours, theirs, inputs(), coarsest(F32 if exact else BF16))
    assert calls(ours, inputs()) == (1, 1)


@pytest.mark.parametrize(
    "which", [("promote_dtype",), ("lora_promote_dtype",), ("promote_dtype", "lora_promote_dtype")]
)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("lora_param_dtype", [F32, BF16])
def test_promotion_switched_off(which, dtype, lora_param_dtype):
    """Flax leaves mixed dtypes to JAX then."""
    kwargs = dict.fromkeys(which, lambda args, dtype: args)
    kwargs["lora_param_dtype"] = lora_param_dtype
    ours, theirs = linear(LoRALinear, **kwargs), linear(nnx.LoRALinear, **kwargs)
    eps = coarsest(dtype, lora_param_dtype)
    check_close(ours(inputs(dtype)), theirs(inputs(dtype)), eps)


# ---- Scaling.


@pytest.mark.parametrize(
    ("kwargs", "scaling"),
    [
        ({}, 1.0),
        ({"alpha": 8}, 2.0),
        ({"alpha": 1.0}, 0.25),
        ({"alpha": 8, "use_rslora": True}, 4.0),
    ],
    ids=str,
)
def test_scaling(kwargs, scaling):
    model, x = linear(LoRALinear, **kwargs), inputs()
    assert model.lora.scaling == scaling
    lora = model.lora
    delta = (x @ lora.lora_a[...]) @ lora.lora_b[...]
    check_close(model(x), nnx.Linear.__call__(model, x) + scaling * delta, coarsest(F32))
    check_close(adapter(LoRA, **kwargs)(x), scaling * adapter(LoRA)(x), coarsest(F32))


@pytest.mark.parametrize("make", [linear, adapter])
def test_rslora_needs_alpha(make):
    with pytest.raises(ValueError, match=r"use_rslora=True .* needs alpha"):
        make(LoRALinear if make is linear else LoRA, use_rslora=True)


def test_an_implementation_that_is_missing_raises_when_called():
    with pytest.raises(ValueError, match="'cuda' is not available"):
        linear(LoRALinear, implementation="cuda")(inputs())


# ---- A module's life.


def test_split_merge_and_state_dict():
    model, x = linear(LoRALinear, alpha=8), inputs()
    graphdef, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)
    assert set(nnx.to_pure_dict(adapters)) == {"lora"}
    assert set(nnx.to_pure_dict(rest)) == {"kernel", "bias"}
    chex.assert_trees_all_equal(nnx.merge(graphdef, adapters, rest)(x), model(x))

    other = linear(LoRALinear, seed=1, alpha=8)
    assert (other(x) != model(x)).any()
    state = nnx.state(other)
    nnx.replace_by_pure_dict(state, nnx.to_pure_dict(nnx.state(model)))
    nnx.update(other, state)
    chex.assert_trees_all_equal(other(x), model(x))


def test_a_checkpoint_of_flax_s_own_loads():
    ours, theirs = linear(LoRALinear, seed=1), linear(nnx.LoRALinear, seed=2)
    nnx.update(ours, nnx.state(theirs))
    check_same(ours, theirs, inputs(), coarsest(F32))


class Network(nnx.Module):
    """Two adapted layers."""

    def __init__(self, implementation):
        kwargs = {"lora_rank": RANK, "alpha": 8, "implementation": implementation}
        self.first = LoRALinear(IN, OUT, rngs=nnx.Rngs(0), **kwargs)
        self.second = LoRALinear(OUT, 2, rngs=nnx.Rngs(1), **kwargs)

    def __call__(self, x):
        return self.second(nnx.gelu(self.first(x)))


def train(implementation, steps=8):
    """The losses and the trained model; only the adapters are trained."""
    model = Network(implementation)
    optimizer = nnx.Optimizer(model, optax.sgd(0.05), wrt=nnx.LoRAParam)
    x, target = inputs(rows=(32,)), jnp.asarray(np.random.default_rng(1).normal(size=(32, 2)), F32)

    @nnx.jit
    def step(model, optimizer, x, target):
        loss, grads = nnx.value_and_grad(
            lambda model: ((model(x) - target) ** 2).mean(), argnums=nnx.DiffState(0, nnx.LoRAParam)
        )(model)
        optimizer.update(model, grads)
        return loss

    return [float(step(model, optimizer, x, target)) for _ in range(steps)], model


def test_training_the_adapters(implementation):
    losses, model = train(implementation)
    assert losses[-1] < 0.9 * losses[0]
    expected, other = train("xla")
    # A step of SGD is as smooth as the gradients are: float32 sums in another order.
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    trained, frozen = nnx.state(model, nnx.LoRAParam, ...)
    for a, b in zip(jax.tree.leaves(trained),
                    jax.tree.leaves(nnx.state(other, nnx.LoRAParam)), strict=True):  # fmt: skip
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    fresh, untouched = nnx.state(Network(implementation), nnx.LoRAParam, ...)
    chex.assert_trees_all_equal(frozen, untouched)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), trained, fresh)
    assert all(jax.tree.leaves(changed))


def test_frozen_weights_have_no_gradient_in_the_program():
    graphdef, adapters, rest = nnx.split(linear(LoRALinear), nnx.LoRAParam, ...)

    def loss(adapters, rest, x):
        return (nnx.merge(graphdef, adapters, rest)(x) ** 2).sum()

    text = jax.jit(jax.grad(loss)).lower(adapters, rest, inputs()).as_text()
    assert 'grads = "ab"' in text
    assert "stablehlo.dot_general" not in text
