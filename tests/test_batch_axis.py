"""The native calls with batch axes, called directly: numpy's broadcasting, without the copies.

An operand of size 1 along a batch axis is shared by all elements along it. Every result is
compared with numpy's own broadcast products in float64, element by element; results and
workspace begin as NaN, so that an entry that nobody wrote, or read too early, shows.
"""

import itertools
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jax_fused_lora.implementations import load

SCALING = 0.75
ROWS = (1, 3, 5, 17, 37, 70)  # on both sides of every number that the CPU calls few
LETTERS = {"x": "mk", "lora_a": "kr", "lora_b": "rn", "kernel": "kn", "bias": "n", "g": "mn",
           "h": "mr", "y": "mn", "dx": "mk", "da": "kr", "db": "rn"}  # fmt: skip
RESULTS = {"x": "dx", "a": "da", "b": "db"}
FLOAT32 = ("h", "base")  # whatever x is
ORDER = {
    "lora_forward": ("x", "lora_a", "lora_b", "kernel", "base", "bias"),
    "lora_backward": ("g", "x", "lora_a", "lora_b", "h", "kernel", "base"),
}


@pytest.fixture(params=[name for name in ("cpu", "metal", "cuda") if load(name).targets])
def native(request):
    """Each native library, in whatever order its threads run: the kernels know of no batch."""
    return request.param


def names(call, form):
    """A call's operands."""
    left_out = {"kernel", "base"} - {form} | ({"bias"} if form == "delta" else set())
    return [name for name in ORDER[call] if name not in left_out]


def letters(call, name):
    return {"lora_forward": "mn", "lora_backward": "mk"}[call] if name == "base" else LETTERS[name]


def draw(call, axes, sizes, dtype, *, wide_b=False, seed=0):
    """Random operands; `axes` has the batch axes of each, by name."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(
            rng.normal(size=(*own, *(sizes[letter] for letter in letters(call, name)))),
            "float32" if name in FLOAT32 or (wide_b and name == "lora_b") else dtype,
        )
        for name, own in axes.items()
    }


def truth(call, operands, batch, grads):
    """(truth, bound) of each result in float64; see `jax_fused_lora.accuracy`."""

    def compute(transform):
        o = {name: transform(np.asarray(v, np.float64)) for name, v in operands.items()}
        turned = {name: np.swapaxes(v, -1, -2) for name, v in o.items() if name != "bias"}
        if call == "lora_forward":
            h = o["x"] @ o["lora_a"]
            y = SCALING * h @ o["lora_b"] + o.get("base", 0)
            if "kernel" in o:
                y = y + o["x"] @ o["kernel"]
            if "bias" in o:
                y = y + o["bias"][..., None, :]
            results = {"y": y, "h": h}
        else:
            t = SCALING * o["g"] @ turned["lora_b"]
            dx = t @ turned["lora_a"] + o.get("base", 0)
            if "kernel" in o:
                dx = dx + o["g"] @ turned["kernel"]
            results = {
                "dx": dx, "da": turned["x"] @ t, "db": SCALING * turned["h"] @ o["g"],
            }  # fmt: skip
            results = {RESULTS[w]: results[RESULTS[w]] for w in grads}
        return {n: np.broadcast_to(v, (*batch, *v.shape[-2:])) for n, v in results.items()}

    exact, bound = compute(lambda v: v), compute(np.abs)
    return {name: (exact[name], bound[name]) for name in exact}


def floats(native, call, axes, sizes, form, slices, grads):
    """Floats of workspace that a call needs at most."""
    m, k, n, r = (sizes[letter] for letter in "mknr")
    if native == "cuda":
        return load("cuda").workspace(m, k, n, r, form, grads if call == "lora_backward" else "")
    if native == "metal":
        return m * r if call == "lora_backward" else 0
    own = {name: math.prod(a) for name, a in axes.items()}
    count = math.prod(np.broadcast_shapes(*axes.values()))
    padded = {letter: -(-sizes[letter] // 64) * 64 for letter in "kn"}
    if call == "lora_backward":
        turned = "x" in grads and form != "kernel"
        factors = turned * own["lora_a"] * r * padded["k"] + own["lora_b"] * r * n
        sums = slices * (k + n) if slices > 1 else 0
        return count * r * (m + sums) + factors
    products, rows = (1, own["x"] * m) if own.get("kernel") == 1 else (count, m)
    few = form == "kernel" and rows <= 8  # rows of which slices are summed, 16 numbers apart
    product = products * rows * (n + 16) if few else 0
    factors = own["lora_a"] * r * k + own["lora_b"] * r * padded["n"] + own.get("bias", 0) * n
    return factors + slices * product


def nans(like):
    """jnp.full, without compiling a program for every shape.

    Memory of numpy's that is aligned JAX takes as it is, and cannot give to a result; this is not.
    """
    return jnp.asarray(
        np.full(math.prod(like.shape) + 1, np.nan, like.dtype)[1:].reshape(like.shape)
    )


def make(native, call, operands, axes, sizes, *, form, slices=1, grads="xab", in_place=False,
         workspace=None, batch=None):  # fmt: skip
    """Calls a target into NaN; the results by name."""
    batch = np.broadcast_shapes(*axes.values()) if batch is None else batch
    wanted = ("y", "h") if call == "lora_forward" else [RESULTS[w] for w in grads]
    like = {"da": operands["lora_a"], "db": operands["lora_b"]}
    types = [
        jax.ShapeDtypeStruct(
            (*batch, *(sizes[letter] for letter in LETTERS[name])),
            "float32" if name == "h" else like.get(name, operands["x"]).dtype,
        )
        for name in wanted
    ]
    if workspace is None:
        workspace = floats(native, call, axes, sizes, form, slices, grads)
    types.append(jax.ShapeDtypeStruct((workspace,), "float32"))
    attributes = {"scaling": np.float32(SCALING), "form": form, "slices": np.int64(slices)}
    if call == "lora_backward":
        attributes["grads"] = grads
    order = [name for name in ORDER[call] if name in operands]
    foreign = jax.ffi.ffi_call(
        load(native).targets[call], types,
        input_output_aliases={order.index("base"): 0} if in_place else None,
    )  # fmt: skip
    run = jax.jit(
        lambda poison, operands: foreign(*operands, **attributes),
        donate_argnums=0, keep_unused=True,
    )  # fmt: skip
    poison = [nans(each) for each in types]
    addresses = {each.unsafe_buffer_pointer() for each in poison if each.size}
    results = jax.block_until_ready(run(poison, [operands[name] for name in order]))
    assert {each.unsafe_buffer_pointer() for each in results if each.size} <= addresses
    return dict(zip(wanted, results[:-1], strict=True))


def check(native, call, axes, sizes, dtype, *, form, grads="xab", wide_b=False, seed=0, **options):
    operands = draw(call, axes, sizes, dtype, wide_b=wide_b, seed=seed)
    results = make(native, call, operands, axes, sizes, form=form, grads=grads, **options)
    expected = truth(call, operands, np.broadcast_shapes(*axes.values()), grads)
    for name, result in results.items():
        wide = name == "h" or (name == "db" and wide_b)
        what = f"{name} of {call}, {form}, {dtype}, {sizes}, {axes}"
        oracle.check(what, result, expected[name], "float32" if wide else dtype)


def served(native, form, rows):
    """Whether a library has a form, for a float32 call of so many rows."""
    if form == "base":
        return native != "metal"
    return native != "cuda" or form == "delta" or rows <= 16


def shape(i, rows=ROWS, k=33, n=45, r=5):
    return {"m": rows[i % len(rows)], "k": k, "n": n, "r": r}


# ---- Which operand is shared.


@pytest.mark.parametrize("form", ["delta", "kernel", "base"])
@pytest.mark.parametrize("call", ["lora_forward", "lora_backward"])
def test_any_operands_may_be_shared(native, call, form):
    """All subsets of the operands have a batch axis, all others are shared."""
    given = names(call, form)
    for i, own in enumerate(itertools.product([(1,), (3,)], repeat=len(given))):
        sizes, dtype = shape(i), oracle.DTYPES[i // len(ROWS) % 3]
        if served(native, form, sizes["m"]):
            check(native, call, dict(zip(given, own, strict=True)), sizes, dtype, form=form)


@pytest.mark.parametrize("form", ["delta", "kernel", "base"])
@pytest.mark.parametrize("call", ["lora_forward", "lora_backward"])
def test_two_axes(native, call, form):
    """Operands that are shared along one axis, another one, both or none."""
    given, rng = names(call, form), np.random.default_rng(1)
    choices = list(itertools.product([1, 2], [1, 3]))
    for i in range(24):
        own = [choices[j] for j in rng.integers(4, size=len(given))]
        sizes, dtype = shape(i, k=20, n=70, r=4), oracle.DTYPES[i // len(ROWS) % 3]
        if served(native, form, sizes["m"]):
            check(native, call, dict(zip(given, own, strict=True)), sizes, dtype, form=form)


def test_three_axes_around_a_shared_one(native):
    axes = {"x": (2, 1, 3), "lora_a": (2, 4, 1), "lora_b": (1, 4, 3)}
    check(native, "lora_forward", axes, shape(2), "float32", form="delta")
    check(native, "lora_backward", axes | {"g": (2, 4, 3), "h": (2, 4, 3)}, shape(2), "float32",
          form="delta")  # fmt: skip


# ---- How a call is cut.


@pytest.mark.parametrize("call", ["lora_forward", "lora_backward"])
@pytest.mark.parametrize("rows", [2, 9, 70])
@pytest.mark.parametrize("slices", [1, 2, 3])
def test_slices(native, call, rows, slices):
    if native == "metal":
        pytest.skip("slices are the CPU's")
    if rows < slices or not served(native, "kernel", rows):
        pytest.skip("no call has so many slices or rows")
    own = (3,)
    for shared in ("x", "g", "kernel", "lora_a", "lora_b", None):
        axes = {name: (1,) if name == shared else own for name in names(call, "kernel")}
        sizes = shape(0, rows=(rows,), k=130, n=67, r=16)
        check(native, call, axes, sizes, "float32", form="kernel", slices=slices)


@pytest.mark.parametrize("shared", [(), ("kernel",), ("kernel", "g", "x"), ("lora_a", "lora_b")])
@pytest.mark.parametrize("call", ["lora_forward", "lora_backward"])
def test_many_small_elements(native, call, shared):
    """So many that several make a block, on several threads; the same bits in every run."""
    count = 3000 if native == "cpu" else 30
    given = names(call, "kernel")
    axes = {name: (1,) if name in shared else (count,) for name in given}
    sizes = {"m": 1, "k": 17, "n": 19, "r": 4}
    check(native, call, axes, sizes, "float32", form="kernel")
    operands = draw(call, axes, sizes, "float32")
    runs = [make(native, call, operands, axes, sizes, form="kernel") for _ in range(3)]
    for name, result in runs[0].items():
        assert all(np.array_equal(result, run[name]) for run in runs[1:])


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("call", ["lora_forward", "lora_backward"])
@pytest.mark.parametrize(
    ("count", "rows", "rank"),
    [(1, 300, 16), (1, 65, 130), (1, 520, 0), (3, 130, 5), (4, 70, 150)],
    ids=["of one element", "rank over a step of depth", "rank 0", "of several", "cut apart"],
)
def test_blocks_of_a_product(native, call, dtype, count, rows, rank):
    """More rows and columns than a block has, of elements that begin and end inside of one."""
    if native != "cpu":
        pytest.skip("these blocks are the CPU's")
    sizes = {"m": rows, "k": 530, "n": 700, "r": rank}
    for shared in (("kernel",), ("kernel", "x", "g"), ()):
        axes = {name: (1,) if name in shared else (count,) for name in names(call, "kernel")}
        check(native, call, axes, sizes, dtype, form="kernel")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("call", ["lora_forward", "lora_backward"])
def test_elements_worth_several_threads(native, call, dtype):
    if native != "cpu":
        pytest.skip("threads are the CPU's")
    sizes = {"m": 40, "k": 160, "n": 300, "r": 8}
    for shared in ((), ("kernel",), ("kernel", "lora_a"), ("kernel", "bias", "g")):
        axes = {name: (1,) if name in shared else (5,) for name in names(call, "kernel")}
        check(native, call, axes, sizes, dtype, form="kernel", slices=2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rows", [2, 20])
def test_float32_b_of_each_element(native, rows, dtype):
    """A B into which a traced scaling was folded stays float32, and so does its gradient."""
    for own in [(1,), (3,)]:
        for call in ORDER:
            axes = {name: (3,) for name in names(call, "delta")} | {"lora_b": own}
            check(native, call, axes, shape(0, rows=(rows,)), dtype, form="delta", wide_b=True)


@pytest.mark.parametrize("grads", ["x", "a", "b", "xa", "xb", "ab", ""])
@pytest.mark.parametrize("form", ["delta", "kernel"])
def test_gradients_that_are_asked_for(native, form, grads):
    axes = {name: (3,) for name in names("lora_backward", form)} | {"lora_a": (1,)}
    check(native, "lora_backward", axes, shape(2), "float32", form=form, grads=grads)


@pytest.mark.parametrize("rows", [1, 5, 37])
def test_base_in_place(native, rows):
    """The results take the buffer of a base that has the full batch."""
    if native == "metal":
        pytest.skip("Metal has no use for a base")
    for call in ORDER:
        axes = {name: (1, 3) for name in names(call, "base")} | {"base": (2, 3), "x": (2, 1)}
        sizes = shape(0, rows=(rows,))
        check(native, call, axes, sizes, "float32", form="base", in_place=True)


@pytest.mark.parametrize("wrap", [True, False], ids=["wrapped", "copied"])
def test_metal_has_one_command_buffer_for_all_elements(emulated, monkeypatch, wrap):
    if not wrap:
        monkeypatch.setenv("METAL_EMULATOR_NO_WRAP", "1")
    for call, kernels in {
        "lora_forward": {"shrink": 6, "gemm_expand": 6},
        "lora_backward": {"shrink": 6, "gemm_expand": 6, "grad": 12},
    }.items():
        axes = {name: (2, 3) for name in names(call, "kernel")} | {"kernel": (1, 1), "x": (2, 1)}
        emulated.reset_counters()
        check("metal", call, axes, shape(3), "bfloat16", form="kernel")
        counters = emulated.counters()
        assert counters["command_buffers"] == 1
        assert {name: each["count"] for name, each in counters["kernels"].items()} == kernels


# ---- Nothing, and next to nothing.


@pytest.mark.parametrize("batch", [(0,), (1,), (2, 0), (0, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("form", ["delta", "kernel"])
@pytest.mark.parametrize("call", ["lora_forward", "lora_backward"])
def test_batch_of_nothing_and_of_one(native, call, form, batch):
    given = names(call, form)
    shared = tuple(1 for _ in batch)
    for alone in (*given, None):  # has the batch axes alone; None: all have them
        axes = {name: batch if alone in (name, None) else shared for name in given}
        check(native, call, axes, shape(2), "float32", form=form)


@pytest.mark.parametrize("letter", ["m", "k", "n", "r"])
@pytest.mark.parametrize("form", ["delta", "kernel"])
@pytest.mark.parametrize("call", ["lora_forward", "lora_backward"])
def test_elements_without_something(native, call, form, letter):
    """Without rows, say: what is a sum of nothing is zero, of each element."""
    for other in ({}, {"n": 0}, {"r": 0}):
        axes = {name: (3,) for name in names(call, form)} | {"lora_a": (1,)}
        sizes = shape(2) | {letter: 0} | other
        for dtype in ("float32", "bfloat16"):
            check(native, call, axes, sizes, dtype, form=form)


# ---- What is refused.

WRONG_AXES = [
    ({"lora_a": (2,)}, "lora_a has shape (2, 5, 2), needed (1 or 4, 5, 2)"),
    ({"lora_b": (3,)}, "lora_b has shape (3, 2, 7), needed (1 or 4, 2, 7)"),
    ({"kernel": (0,)}, "kernel has shape (0, 5, 7), needed (1 or 4, 5, 7)"),
    ({"x": (0,)}, "lora_a has shape (4, 5, 2), needed (1 or 0, 5, 2)"),
    ({"x": (1,), "kernel": (5,)}, "kernel has shape (5, 5, 7), needed (1 or 4, 5, 7)"),
    ({"kernel": ()}, "kernel has shape (5, 7), needed (1 or 4, 5, 7)"),
    ({"kernel": (1, 4)}, "kernel has shape (1, 4, 5, 7), needed (1 or 4, 5, 7)"),
    ({"lora_a": ()}, "lora_a has shape (5, 2), needed two dimensions after x's 1 batch axes"),
    ({"x": ()}, "lora_a has shape (4, 5, 2), needed two dimensions"),
    ({"lora_b": (4, 1)}, "lora_b has shape (4, 1, 2, 7), needed two dimensions after x's 1"),
    ({"x": (1,) * 17}, "needed two dimensions after at most 16 batch axes"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "change", "text"),
    [(call, *wrong) for wrong in WRONG_AXES for call in ORDER]
    + [
        ("lora_forward", {"bias": (3,)}, "bias has shape (3, 7), needed (1 or 4, 7)"),
        ("lora_forward", {"bias": ()}, "bias has shape (7), needed (1 or 4, 7)"),
        ("lora_backward", {"g": (5,)}, "g has shape (5, 3, 7), needed (1 or 4, 3, 7)"),
        ("lora_backward", {"h": (2,)}, "h has shape (2, 3, 2), needed (1 or 4, 3, 2)"),
        ("lora_backward", {"h": ()}, "h has shape (3, 2), needed (1 or 4, 3, 2)"),
    ],
)
def test_wrong_batch_axes(native, call, change, text):
    axes = {name: (4,) for name in names(call, "kernel")} | change
    sizes = {"m": 3, "k": 5, "n": 7, "r": 2}
    with pytest.raises(jax.errors.JaxRuntimeError, match=re.escape(f"{call}: ")) as raised:
        make(native, call, draw(call, axes, sizes, "float32"), axes, sizes, form="kernel",
             workspace=4096, batch=(4,))  # fmt: skip
    assert text in str(raised.value)


@pytest.mark.parametrize("batch", [(1,), (3,), (), (4, 1)], ids=str)
@pytest.mark.parametrize(
    ("call", "needed"),
    [("lora_forward", "needed (4, 3, 7)"), ("lora_backward", "needed (4, 3, 5)")],
)
def test_results_have_the_full_batch(native, call, needed, batch):
    axes = {name: (4,) for name in names(call, "kernel")}
    sizes = {"m": 3, "k": 5, "n": 7, "r": 2}
    with pytest.raises(jax.errors.JaxRuntimeError, match=re.escape(needed)):
        make(native, call, draw(call, axes, sizes, "float32"), axes, sizes, form="kernel",
             workspace=4096, batch=batch)  # fmt: skip


@pytest.mark.parametrize("call", ["lora_forward", "lora_backward"])
@pytest.mark.parametrize("shared", [(), ("lora_a",), ("kernel",), ("x", "kernel", "bias")])
def test_the_workspace_is_used_to_the_last_float(native, call, shared):
    """A call of many rows, the forward one in the CPU's own way."""
    if native == "cuda" or (native == "metal" and call == "lora_forward"):
        pytest.skip("needs none, or one that is not for a test to know")
    axes = {name: (1,) if name in shared else (3,) for name in names(call, "kernel")}
    sizes = shape(3)
    needed = floats(native, call, axes, sizes, "kernel", 2, "xab")
    operands = draw(call, axes, sizes, "bfloat16")
    text = f"workspace has {needed - 1} floats, needed {needed}"
    with pytest.raises(jax.errors.JaxRuntimeError, match=text):
        make(native, call, operands, axes, sizes, form="kernel", slices=2, workspace=needed - 1)


@pytest.mark.parametrize("shared", [(), ("lora_b",), ("kernel",), ("x", "kernel", "bias")])
def test_the_sums_of_few_rows_are_in_the_workspace(native, shared):
    if native != "cpu":
        pytest.skip("slices are the CPU's")
    axes = {name: (1,) if name in shared else (3,) for name in names("lora_forward", "kernel")}
    own = {name: math.prod(a) for name, a in axes.items()}
    sizes, slices = {"m": 1, "k": 33, "n": 45, "r": 5}, 2
    widened = (own["lora_b"] * 5 + own["bias"]) * 45
    needed = widened + slices * (own["x"] if own["kernel"] == 1 else 3) * (45 + 16)
    operands = draw("lora_forward", axes, sizes, "bfloat16")
    run = partial(make, native, "lora_forward", operands, axes, sizes, form="kernel", slices=slices)
    run(workspace=needed)
    text = f"workspace has {needed - 1} floats, needed {needed}"
    with pytest.raises(jax.errors.JaxRuntimeError, match=text):
        run(workspace=needed - 1)
