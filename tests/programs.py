"""Small layers for tests of transformations, and what a program's text says that it does.

Lowered text is what we asked XLA for; compiled text is what XLA made of it.
"""

import re
from itertools import chain, combinations

import oracle

from jax_fused_lora import lora_forward, lora_linear

SCALING = 0.75
LINEAR = ("x", "kernel", "lora_a", "lora_b", "bias")
# Two orders of the same float32 sums, several layers deep and relative to their largest result.
CLOSE = {"rtol": 1e-5, "atol": 1e-4}


def apply(operands, implementation="cpu", scaling=SCALING):
    op = lora_linear if "kernel" in operands else lora_forward
    return op(**operands, scaling=scaling, implementation=implementation)


def make(rows, linear=True, k=24, n=40, r=4, seed=0):
    return oracle.operands(rows, k, n, r, "float32", kernel=linear, bias=linear, seed=seed)


def without(operands, name):
    return {key: value for key, value in operands.items() if key != name}


def check_all(results, expected):
    for name, result in results.items():
        oracle.check(name, result, expected[name], "float32")


def inlined(text):
    """Lowered text with each function's in place of its calls: JAX writes equal functions once."""
    functions = dict(re.findall(r"func\.func \w+ @([\w.]+)\((.*?)\n  \}", text, re.DOTALL))
    if not functions:  # compiled
        return text
    call = r"\bcall @([\w.]+)\("
    expand = lambda name: re.sub(call, lambda found: expand(found[1]), functions[name])  # noqa: E731
    return expand("main")


def calls(text, call):
    """How often a program calls a CPU target, in lowered or compiled text."""
    target = rf'(?:@|custom_call_target=")jax_fused_lora\.cpu\.{call}\b'
    return len(re.findall(target, inlined(text)))


def grads_asked(text):
    return re.findall(r'grads = "(\w*)"', inlined(text))


def subsets(names):
    counts = range(1, len(names) + 1)
    return list(chain.from_iterable(combinations(names, count) for count in counts))
