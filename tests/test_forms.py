"""The rule that picks a form: what it says of GPUs, which no machine of the tests has.

Of the CPU it is held to by the tests that run its forms, but for what this machine's instruction
sets decide and what XLA does better; of Metal by tests/test_metal.py.
"""

import pytest

from jax_fused_lora import forms
from jax_fused_lora.forms import Problem


def both(problem, library="cuda", **options):
    forward = forms.forward_form(library, problem, **options)
    return forward, forms.backward_form(library, problem, **options)


def layer(rows, k=4096, n=4096, rank=16, dtype="bfloat16", has_kernel=True, wide_b=False):
    return Problem(rows, k, n, rank, dtype, has_kernel, wide_b)


@pytest.mark.parametrize(
    ("rows", "forward", "backward"),
    [
        (1, "kernel", "kernel"),
        (16, "kernel", "kernel"),
        (17, "kernel", "kernel"),
        (32, "kernel", "kernel"),
        (128, "kernel", "kernel"),
        (129, "kernel", "kernel"),
        (256, "kernel", "kernel"),
        (257, "kernel", "kernel"),  # a round, at most
        (384, "kernel", "kernel"),
        (512, "kernel", "kernel"),
        (640, "xla", "xla"),  # a second round of tiles for 28 of 160
        (1023, "kernel", "kernel"),
        (1024, "kernel", "kernel"),
        (8192, "kernel", "kernel"),
    ],
)
def test_cuda_takes_by_default_what_it_is_faster_at(rows, forward, backward):
    assert both(layer(rows), product=True) == (forward, backward)


@pytest.mark.parametrize(
    ("problem", "forward", "backward"),
    [
        (layer(192, k=1024, n=1024, rank=64), "kernel", "kernel"),
        (layer(384, k=2048, n=2048), "kernel", "kernel"),
        (layer(640, k=3072, n=3072), "kernel", "kernel"),  # two of 64×128
        (layer(288, k=4096, n=1024), "kernel", "kernel"),
        (layer(640, k=2048, n=2048), "kernel", "kernel"),
        (layer(1100, k=4096, n=1024), "kernel", "kernel"),
        (layer(1280, k=2048, n=2048), "xla", "xla"),
        (layer(1024, k=2048, n=2048), "kernel", "kernel"),
        (layer(384, k=4096, n=11008), "xla", "xla"),  # so wide only from 385 rows on
        (layer(400, k=4096, n=11008), "xla", "kernel"),
        (layer(450, k=4096, n=11008), "kernel", "kernel"),
        (layer(512, k=4096, n=11008), "kernel", "kernel"),
    ],
)
def test_tiles_fill_most_of_their_rounds_or_are_one(problem, forward, backward):
    assert both(problem, product=True) == (forward, backward)


@pytest.mark.parametrize(
    "problem",
    [
        layer(1, k=56),
        layer(1, rank=128),
        layer(64, n=56),
        layer(64, rank=72),
        layer(192, k=1024, rank=72),
        layer(192, k=11008),
        layer(1024, k=256, n=248),
        layer(1024, k=8192, n=16),
        layer(256, k=256, n=256),
    ],
    ids=[
        "small",
        "rank",
        "some, small",
        "some, rank",
        "more, rank",
        "more, wide",
        "many, small",
        "many, narrow",
        "more, small",
    ],
)
def test_few_rows_that_were_not_measured_are_left_to_xla(problem):
    assert both(problem, product=True) == ("xla", "xla")
    assert both(problem, product=True, named=True) == ("kernel", "kernel")


@pytest.mark.parametrize(
    ("problem", "forward", "backward"),
    [
        (layer(127, rank=128), "xla", "xla"),
        (layer(128, rank=120), "kernel", "kernel"),
        (layer(128, rank=128), "kernel", "kernel"),
        (layer(256, rank=40), "kernel", "kernel"),
        (layer(256, k=2048, n=2048, rank=256), "kernel", "dx"),
        (layer(256, k=11008, rank=256), "kernel", "dx"),
        (layer(256, n=1024, rank=256), "xla", "xla"),
        (layer(256, rank=132), "xla", "xla"),
    ],
)
def test_high_ranks(problem, forward, backward):
    assert both(problem, product=True) == (forward, backward)


@pytest.mark.parametrize(
    ("problem", "backward"),
    [
        (layer(16384, rank=16), "kernel"),
        (layer(16384, rank=24), "dx"),
        (layer(16384, n=8192), "dx"),
        (layer(32768, k=2048, n=2048), "dx"),
        (layer(2048, rank=64), "kernel"),
        (layer(2048, rank=128), "dx"),
        (layer(512, rank=136), "dx"),
        (layer(2048, rank=128, dtype="float16"), "kernel"),
        (layer(8192, rank=64, dtype="float16"), "dx"),
        (layer(512, rank=136, dtype="float16"), "dx"),
        (layer(256, rank=136, dtype="float16"), "kernel"),
    ],
    ids=[
        "swept",
        "more ranks",
        "g is wide",
        "dx is narrow",
        "rows too few",
        "many rows",
        "rank is high",
        "float16, rows too few",
        "float16, many rows",
        "float16, rank is high",
        "float16, rank is high, rows too few",
    ],
)
def test_large_gradients_of_factors_are_left_to_xla_but_for_a_swept_one(problem, backward):
    assert both(problem, product=True) == ("kernel", backward)


def test_gradients_without_a_kernel_are_one_call():
    assert both(layer(8192, has_kernel=False), product=True, named=True) == ("delta", "delta")


@pytest.mark.parametrize(
    ("problem", "forward", "backward"),
    [
        (layer(512, rank=12, dtype="float16"), "xla", "delta"),
        (layer(1024, k=4104, dtype="float16"), "delta", "delta"),
        (layer(512, rank=64, dtype="float16"), "delta", "delta"),
        (layer(8192, rank=12), "xla", "xla"),
        (layer(2048, k=1024, n=1016), "delta", "delta"),
        (layer(2048, k=1024, n=1032), "xla", "xla"),
        (layer(2048, k=1024, n=1024, rank=24), "xla", "xla"),
        (layer(2047, k=1024, n=1016), "xla", "xla"),
        (layer(8192, dtype="float32"), "xla", "xla"),
    ],
)
def test_without_a_kernel_xla_is_slow_in_float16_and_narrow_layers(problem, forward, backward):
    problem = problem._replace(has_kernel=False)
    assert both(problem, product=True) == (forward, backward)
    assert both(problem) == ("xla", "xla")


@pytest.mark.parametrize(
    ("problem", "forward", "backward"),
    [
        (layer(1), "delta", "delta"),
        (layer(480), "delta", "delta"),
        (layer(481), "delta", "delta"),
        (layer(481, n=4160), "xla", "xla"),
        (layer(100000, k=256, n=128, rank=8, dtype="float16"), "delta", "delta"),
        (layer(8192, rank=32), "xla", "xla"),
        (layer(8192, wide_b=True), "xla", "xla"),
        (layer(16, rank=32, dtype="float16"), "delta", "delta"),
        (layer(16, rank=64), "xla", "xla"),
        (layer(16, rank=12), "xla", "xla"),
        (layer(16, k=4096, n=4128), "xla", "xla"),
        (layer(16, wide_b=True), "xla", "xla"),
        (layer(1, dtype="float32"), "delta", "xla"),
        (layer(64, k=772, n=1000, rank=8, dtype="float32"), "delta", "delta"),
        (layer(16, k=770, n=1000, rank=8, dtype="float32"), "xla", "xla"),
        (layer(65, dtype="float32"), "xla", "xla"),
    ],
)
def test_without_a_kernel_usual_ranks_have_kernels_of_their_own(problem, forward, backward):
    problem = problem._replace(has_kernel=False)
    assert both(problem, product=True) == (forward, backward)
    assert both(problem) == ("xla", "xla")
    assert both(problem, named=True) == ("delta", "delta")


def test_adapters_that_share_a_kernel_are_added_to_one_product():
    problem = layer(8192)._replace(shared_kernel=True)
    assert both(problem, product=True) == ("xla", "xla")
    assert both(problem, product=True, named=True) == ("base", "base")


@pytest.mark.parametrize(
    "problem",
    [
        layer(8192, dtype="float32"),
        layer(8192, k=4100),
        layer(8192, n=4100),
        layer(8192, k=0),
        layer(8192, n=0),
        layer(8192, wide_b=True),
    ],
    ids=["float32", "k", "n", "no k", "no n", "traced scaling"],
)
def test_what_the_copy_engine_cannot_read_is_left_to_xla(problem):
    assert both(problem, product=True) == ("xla", "xla")
    assert both(problem, product=True, named=True) == ("base", "base")


def test_a_rank_of_no_whole_rows_is_left_to_xla_with_some_rows_and_backward():
    assert both(layer(64, rank=12), product=True) == ("xla", "xla")
    assert both(layer(8192, rank=12), product=True) == ("kernel", "xla")
    assert both(layer(8192, rank=12), product=True, named=True) == ("kernel", "base")


def test_a_rank_of_no_whole_rows_is_left_to_xla_in_a_small_layer():
    assert both(layer(16, k=512, n=512, rank=16), product=True) == ("kernel", "kernel")
    assert both(layer(16, k=512, n=512, rank=12), product=True) == ("xla", "xla")
    assert both(layer(16, rank=12), product=True) == ("kernel", "xla")


def test_a_library_without_the_product_serves_by_name():
    assert both(layer(8192)) == ("xla", "xla")
    assert both(layer(8192), named=True) == ("base", "base")
    assert both(layer(16), named=True) == ("kernel", "kernel")
    assert both(layer(16, has_kernel=False), named=True) == ("delta", "delta")


def test_a_named_library_is_never_xla():
    for library in ("cpu", "metal"):
        for rows in (1, 100, 200, 1000):
            for dtype in ("float32", "bfloat16", "float16"):
                problem = layer(rows, dtype=dtype)
                assert forms.forward_form(library, problem, named=True) != "xla"
                assert forms.backward_form(library, problem, named=True) != "xla"


@pytest.mark.parametrize(
    ("rows", "forward", "backward"),
    [(1, "delta", "xla"), (2, "xla", "xla"), (2048, "xla", "xla")],
)
def test_rank_one_alone_is_left_to_xla_where_it_is_faster(rows, forward, backward):
    problem = layer(rows, rank=1, dtype="float32", has_kernel=False)
    assert both(problem, library="cpu") == (forward, backward)
    assert both(problem, library="cpu", named=True) == ("delta", "delta")
    assert both(problem, library="metal") == ("delta", "delta")
    assert both(problem._replace(rank=2), library="cpu") == ("delta", "delta")
    assert both(problem._replace(rank=0), library="cpu") == ("delta", "delta")
    assert both(problem._replace(dtype="bfloat16"), library="cpu") == ("delta", "delta")


@pytest.mark.parametrize(
    ("dtype", "flags", "form"),
    [
        ("float32", {"avx2"}, "base"),
        ("float32", {"avx2", "avx512bw"}, "kernel"),
        ("float16", {"avx2"}, "kernel"),
        ("bfloat16", {"avx2"}, "kernel"),
        ("bfloat16", {"avx2", "avx512bw", "avx512_bf16", "amx_bf16"}, "kernel"),
    ],
)
def test_who_multiplies_many_rows_on_a_cpu(dtype, flags, form, monkeypatch):
    monkeypatch.setattr(forms, "_cpu_flags", lambda: frozenset(flags))
    problem = layer(1 << 20, dtype=dtype)
    assert forms.forward_form("cpu", problem) == forms.backward_form("cpu", problem) == form
