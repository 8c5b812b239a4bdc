"""What is refused, by whom, and in which words.

Python checks what a user passes, while tracing: nothing has been compiled by then. The native calls
check everything again, because a target can be called by anybody who knows its name, and a wrong
size there would be a wild pointer.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jax_fused_lora import implementations, lora_forward, lora_linear
from jax_fused_lora.implementations import load

F32, F16 = jnp.float32, jnp.float16


def array(*shape, dtype=F32):
    return jnp.asarray(np.ones(shape), dtype)


def good():
    """3 rows, 5 → 7 features, rank 2."""
    return {
        "x": array(3, 5),
        "kernel": array(5, 7),
        "lora_a": array(5, 2),
        "lora_b": array(2, 7),
        "bias": array(7),
    }


@pytest.fixture
def compiled():
    """The list of programs compiled during a test, an entry each."""
    programs = []

    def listen(event, *_, **__):
        if event.endswith("backend_compile_duration"):
            programs.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield programs
    jax.monitoring.unregister_event_duration_listener(listen)


# ---- Python.

# What is changed, the error, and what its text must contain: the argument, its shape, and the
# shape it was compared with.
WRONG = {
    "x is a scalar": ({"x": array()}, ValueError, ["x has shape ()", "(..., in_features)"]),
    "x has other features": (
        {"x": array(3, 6)},
        ValueError,
        ["lora_a has shape (5, 2), needed (6, rank)", "x of shape (3, 6)"],
    ),
    "x is integer": ({"x": array(3, 5, dtype=jnp.int32)}, TypeError, ["x is int32", "floating"]),
    "x is bool": ({"x": array(3, 5, dtype=bool)}, TypeError, ["x is bool", "floating"]),
    "x is complex": ({"x": array(3, 5, dtype=jnp.complex64)}, TypeError, ["x is complex64"]),
    "x is no array": ({"x": "text"}, TypeError, ["x must be an array, got str"]),
    "lora_a is one-dimensional": (
        {"lora_a": array(5)},
        ValueError,
        ["lora_a has shape (5,), needed two dimensions (in_features, rank)"],
    ),
    "lora_a has a batch": ({"lora_a": array(1, 5, 2)}, ValueError, ["lora_a has shape (1, 5, 2)"]),
    "lora_a has another dtype": (
        {"lora_a": array(5, 2, dtype=F16)},
        TypeError,
        ["lora_a is float16, needed float32 to match x", "lora_a.astype(x.dtype)"],
    ),
    "lora_b is one-dimensional": ({"lora_b": array(7)}, ValueError, ["lora_b has shape (7,)"]),
    "lora_b has another rank": (
        {"lora_b": array(3, 7)},
        ValueError,
        ["lora_b has shape (3, 7), needed (2, out_features)", "lora_a of shape (5, 2)"],
    ),
    "lora_b has another dtype": (
        {"lora_b": array(2, 7, dtype=jnp.bfloat16)},
        TypeError,
        ["lora_b is bfloat16, needed float32 to match x"],
    ),
    "scaling is a vector": (
        {"scaling": array(7)},
        ValueError,
        ["scaling has shape (7,), needed a scalar"],
    ),
    "scaling is complex": ({"scaling": jnp.asarray(1j)}, TypeError, ["scaling is complex64"]),
    "scaling is a word": ({"scaling": "large"}, TypeError, ["scaling must be an array, got str"]),
    "scaling is None": ({"scaling": None}, TypeError, ["scaling"]),
    "x is None": ({"x": None}, TypeError, ["x must be an array, got NoneType"]),
    "unknown implementation": (
        {"implementation": "tpu"},
        ValueError,
        ["implementation is 'tpu'", "'cpu', 'metal', 'cuda', 'xla'"],
    ),
}
WRONG_LINEAR = {
    "kernel is None": ({"kernel": None}, TypeError, ["kernel is None", "use lora_forward"]),
    "kernel is one-dimensional": ({"kernel": array(7)}, ValueError, ["kernel has shape (7,)"]),
    "kernel has other inputs": (
        {"kernel": array(6, 7)},
        ValueError,
        ["kernel has shape (6, 7), needed (5, out_features)", "x of shape (3, 5)"],
    ),
    "kernel has other outputs": (
        {"kernel": array(5, 8)},
        ValueError,
        ["kernel has shape (5, 8), needed (5, 7)", "lora_b of shape (2, 7)"],
    ),
    "kernel has another dtype": (
        {"kernel": array(5, 7, dtype=F16)},
        TypeError,
        ["kernel is float16, needed float32 to match x"],
    ),
    "bias has another length": (
        {"bias": array(8)},
        ValueError,
        ["bias has shape (8,), needed (7,)", "lora_b of shape (2, 7)"],
    ),
    "bias would broadcast": ({"bias": array(1)}, ValueError, ["bias has shape (1,), needed (7,)"]),
    "bias has another dtype": ({"bias": array(7, dtype=F16)}, TypeError, ["bias is float16"]),
}
CASES = [
    *((lora_forward, *case) for case in WRONG.values()),
    *((lora_linear, *case) for case in (WRONG | WRONG_LINEAR).values()),
]
IDS = [f"lora_forward-{name}" for name in WRONG] + list(WRONG | WRONG_LINEAR)


def arguments(op, change):
    given = good() | change
    if op is lora_forward:
        given = {name: value for name, value in given.items() if name not in ("kernel", "bias")}
    return given


@pytest.mark.parametrize(("op", "change", "error", "texts"), CASES, ids=IDS)
def test_refused_before_anything_is_compiled(compiled, op, change, error, texts):
    given = arguments(op, change)
    compiled.clear()
    with pytest.raises(error) as caught:
        op(**given)
    assert not compiled
    for text in texts:
        assert text in str(caught.value)


@pytest.mark.parametrize(("op", "change", "error", "texts"), CASES, ids=IDS)
def test_refused_inside_jit_in_the_same_words(compiled, op, change, error, texts):
    arrays = {n: v for n, v in arguments(op, change).items() if isinstance(v, jax.Array)}
    rest = {n: v for n, v in arguments(op, change).items() if n not in arrays}
    compiled.clear()
    with pytest.raises(error) as caught:
        jax.jit(lambda arrays: op(**arrays, **rest))(arrays)
    assert not compiled
    for text in texts:
        assert text in str(caught.value)


@pytest.mark.parametrize("op", [lora_forward, lora_linear])
@pytest.mark.parametrize(
    "name", [name for name, each in implementations().items() if not each.available]
)
def test_a_missing_implementation_says_why(op, name):
    reason = implementations()[name].reason
    with pytest.raises(ValueError, match=re.escape(f"'{name}' is not available: {reason}")):
        op(**arguments(op, {"implementation": name}))


def test_float64_is_not_for_the_native_call():
    """None computes it with XLA; a name that cannot serve raises instead of doing another thing."""
    with jax.enable_x64(True):
        given = {name: value.astype(jnp.float64) for name, value in good().items()}
        with pytest.raises(ValueError, match=r"'cpu' serves float32.*x is float64"):
            lora_linear(**given, implementation="cpu")
        assert lora_linear(**given).dtype == jnp.float64


def test_ranks_that_metal_does_not_serve():
    if not load("metal").implementation.available:
        pytest.skip(load("metal").implementation.reason)
    given = good() | {"lora_a": array(5, 300), "lora_b": array(300, 7)}
    with pytest.raises(ValueError, match="'metal' serves ranks up to 256, lora_a has 300"):
        lora_linear(**given, implementation="metal")
    check_refused(
        "metal", "lora_forward", "the rank is 300, needed at most 256",
        {"lora_a": given["lora_a"], "lora_b": given["lora_b"]}, results={1: ((3, 300), F32)},
    )  # fmt: skip


# ---- The native calls.

FORWARD = {
    "operands": good(),
    "results": [((3, 7), F32), ((3, 2), F32), ((1024,), F32)],
    "attributes": {"scaling": np.float32(1), "form": "kernel", "slices": np.int64(1)},
}
BACKWARD = {
    "operands": {
        "g": array(3, 7),
        "x": array(3, 5),
        "lora_a": array(5, 2),
        "lora_b": array(2, 7),
        "h": array(3, 2),
        "kernel": array(5, 7),
    },
    "results": [((3, 5), F32), ((5, 2), F32), ((2, 7), F32), ((1024,), F32)],
    "attributes": FORWARD["attributes"] | {"grads": "xab"},
}
ORDER = {
    "lora_forward": ("x", "lora_a", "lora_b", "kernel", "base", "bias", "extra"),
    "lora_backward": ("g", "x", "lora_a", "lora_b", "h", "kernel", "base", "extra"),
}


@pytest.fixture(params=[name for name in ("cpu", "metal", "cuda") if load(name).targets])
def native(request):
    """Each native library, in whatever order its threads run."""
    return request.param


def call_native(library, call, change=None, results=None, **attributes):
    """Makes a direct call of a target; None drops an operand or attribute."""
    usual = {"lora_forward": FORWARD, "lora_backward": BACKWARD}[call]
    operands = usual["operands"] | (change or {})
    types = [jax.ShapeDtypeStruct(*result) for result in {**dict(enumerate(usual["results"])),
             **(results or {})}.values() if result]  # fmt: skip
    attributes = usual["attributes"] | attributes
    foreign = jax.ffi.ffi_call(load(library).targets[call], types)
    return jax.block_until_ready(
        jax.jit(foreign, static_argnames=tuple(attributes))(
            *(operands[name] for name in ORDER[call] if operands.get(name) is not None),
            **{name: value for name, value in attributes.items() if value is not None},
        )
    )


def check_refused(library, call, text, *args, **kwargs):
    with pytest.raises(jax.errors.JaxRuntimeError, match=re.escape(text)):
        call_native(library, call, *args, **kwargs)
    # The process lives and the target still works.
    given = good()
    expected = oracle.truth(given, np.ones((3, 7)), 1.0)["y"]
    oracle.check("y", call_native(library, "lora_forward")[0], expected, "float32")


@pytest.mark.parametrize(
    ("operand", "text"),
    [
        ({"x": array(5)}, "x has shape (5), needed two dimensions"),
        ({"x": array(1, 3, 5)}, "lora_a has shape (5, 2), needed two dimensions after x's 1 batch"),
        ({"x": array(3, 5, dtype=jnp.int32)}, "x is dtype number 4, needed float32, bfloat16 or"),
        ({"x": array(3, 6)}, "lora_a has shape (5, 2), needed (6, 2)"),
        ({"x": array(3, 5, dtype=F16)}, "lora_a is float32, needed float16"),
        ({"lora_a": array(5)}, "lora_a has shape (5), needed two dimensions"),
        ({"lora_a": array(6, 2)}, "lora_a has shape (6, 2), needed (5, 2)"),
        ({"lora_a": array(5, 2, dtype=F16)}, "lora_a is float16, needed float32"),
        ({"lora_b": array(2)}, "lora_b has shape (2), needed two dimensions"),
        ({"lora_b": array(3, 7)}, "lora_b has shape (3, 7), needed (2, 7)"),
        ({"lora_b": array(2, 7, dtype=F16)}, "lora_b is float16, needed float32"),
        ({"kernel": array(7, 5)}, "kernel has shape (7, 5), needed (5, 7)"),
        ({"kernel": array(5, 7, dtype=F16)}, "kernel is float16, needed float32"),
    ],
)
@pytest.mark.parametrize("call", ["lora_forward", "lora_backward"])
def test_native_operands(native, call, operand, text):
    # In the backward call a wrong row of x or B shows at the cotangent, which is checked first.
    given = dict(operand)
    if call == "lora_backward" and "lora_b" not in given and given.get("x", array()).dtype == F16:
        given["g"] = array(3, 7, dtype=F16)
    check_refused(native, call, f"{call}: {text}", given)


@pytest.mark.parametrize(
    ("call", "operand", "text"),
    [
        ("lora_forward", {"bias": array(8)}, "bias has shape (8), needed (7)"),
        ("lora_forward", {"bias": array(7, dtype=F16)}, "bias is float16, needed float32"),
        ("lora_forward", {"extra": array(7)}, "got 3 operands after x, lora_a, lora_b, needed 1"),
        ("lora_forward", {"kernel": None, "bias": None}, "got 0 operands after x, lora_a, lora_b"),
        ("lora_backward", {"g": array(4, 7)}, "g has shape (4, 7), needed (3, 7)"),
        ("lora_backward", {"g": array(3, 7, dtype=F16)}, "g is float16, needed float32"),
        ("lora_backward", {"h": array(2, 3)}, "h has shape (2, 3), needed (3, 2)"),
        ("lora_backward", {"h": array(3, 2, dtype=F16)}, "h is float16, needed float32"),
        ("lora_backward", {"extra": array(7)}, "got 2 operands after g, x, lora_a, lora_b, h"),
        ("lora_backward", {"kernel": None}, "got 0 operands after g, x, lora_a, lora_b, h"),
    ],
)
def test_native_operands_of_one_call(native, call, operand, text):
    check_refused(native, call, f"{call}: {text}", operand)


@pytest.mark.parametrize("call", ["lora_forward", "lora_backward"])
def test_native_base_is_float32_of_the_product(native, call):
    """x·W (forward, 3×7) or g·Wᵀ (backward, 3×5), already computed: float32, whatever x is."""
    shape = {"lora_forward": (3, 7), "lora_backward": (3, 5)}[call]
    change = {"kernel": None, "bias": None}
    needed = ", ".join(map(str, shape))
    check_refused(
        native, call, f"base has shape (3, 9), needed ({needed})", change | {"base": array(3, 9)},
        form="base",
    )  # fmt: skip
    half = change | {"base": array(*shape, dtype=F16)}
    check_refused(native, call, "base is float16, needed float32", half, form="base")
    right = change | {"base": array(*shape)}
    if native == "metal":
        check_refused(native, call, "form is 'base', needed 'delta' or", right, form="base")
    else:
        call_native(native, call, right, form="base")


def test_native_operands_too_few_to_be_told_apart(native):
    change = {"lora_b": None, "kernel": None, "bias": None}
    check_refused(native, "lora_forward", "Wrong number of arguments", change)


@pytest.mark.parametrize(
    ("call", "results", "text"),
    [
        ("lora_forward", {0: ((3, 8), F32)}, "y has shape (3, 8), needed (3, 7)"),
        ("lora_forward", {0: ((3, 7), F16)}, "y is float16, needed float32"),
        ("lora_forward", {1: ((3, 3), F32)}, "h has shape (3, 3), needed (3, 2)"),
        ("lora_forward", {1: ((3, 2), F16)}, "h is float16, needed float32"),
        ("lora_forward", {2: ((1, 1024), F32)}, "workspace has shape (1, 1024), needed (1024)"),
        ("lora_forward", {2: ((1024,), F16)}, "workspace is float16, needed float32"),
        ("lora_forward", {2: None}, "Wrong number of results"),
        ("lora_backward", {0: ((3, 6), F32)}, "dx has shape (3, 6), needed (3, 5)"),
        ("lora_backward", {1: ((5, 2), F16)}, "da is float16, needed float32"),
        ("lora_backward", {2: ((7, 2), F32)}, "db has shape (7, 2), needed (2, 7)"),
        ("lora_backward", {3: ((1024,), F16)}, "workspace is float16, needed float32"),
        ("lora_backward", {2: None}, "got 3 results, needed 4"),
        ("lora_backward", {4: ((1,), F32)}, "got 5 results, needed 4"),
    ],
)
def test_native_results(native, call, results, text):
    check_refused(native, call, text, results=results)


@pytest.mark.parametrize(
    ("library", "call", "needed"),
    [
        ("cpu", "lora_forward", 69),  # sums of three rows of 7, 16 apart
        ("cpu", "lora_backward", 6),  # t
        ("metal", "lora_backward", 6),  # t
    ],
)
def test_native_workspace(library, call, needed):
    if not load(library).implementation.available:
        pytest.skip(load(library).implementation.reason)
    last = len({"lora_forward": FORWARD, "lora_backward": BACKWARD}[call]["results"]) - 1
    text = f"{call}: workspace has {needed - 1} floats, needed {needed}"
    check_refused(library, call, text, results={last: ((needed - 1,), F32)})


@pytest.mark.parametrize("call", ["lora_forward", "lora_backward"])
def test_native_attributes(native, call):
    text = "form is 'other', needed 'delta', 'kernel' or 'base'"
    check_refused(native, call, f"{call}: {text}", form="other")
    check_refused(native, call, f"{call}: slices is 0, needed 1 to ", slices=np.int64(0))
    check_refused(native, call, f"{call}: slices is -3, needed 1 to ", slices=np.int64(-3))
    # So many that the size of their sums wraps around to nothing.
    check_refused(
        native, call, f"{call}: slices is {1 << 60}, needed 1 to ", slices=np.int64(1 << 60)
    )
    check_refused(
        native, call, f"{call}: got ", form="delta"
    )  # with operands that it has no use for
    # XLA decodes attributes before the call sees them.
    check_refused(native, call, "expected S64 but got S32", slices=np.int32(1))
    check_refused(native, call, "expected F32 but got F64", scaling=np.float64(1))
    check_refused(native, call, "Wrong number of attributes", slices=None)


@pytest.mark.parametrize("grads", ["ax", "xx", "xyz", "X", "xabb"])
def test_native_grads_are_letters_in_order(native, grads):
    text = f"lora_backward: grads is '{grads}', needed letters of 'xab' in this order"
    check_refused(native, "lora_backward", text, grads=grads)
