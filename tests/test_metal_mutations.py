"""The emulator sees what it is there to see: each barrier removed, each guard dropped, each index
shifted in a copy of the shaders makes it, or the comparison with float64, fail.

A mutant that comes out right means a line of the shaders that does nothing, or a blind emulator.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emulator
import pytest

MUTANT = Path(emulator.__file__).with_name("mutant.py")
TEXT = emulator.source()


def each(pattern, replace, kind):
    """A mutant for every place where `pattern` is found: its name and the text."""
    for number, found in enumerate(re.finditer(pattern, TEXT)):
        before, after = TEXT[: found.start()], TEXT[found.end() :]
        where = [*re.finditer(r"inline \S.*?\b(\w+)\(|kernel void (\w+)\(", before)][-1]
        line = before[where.start() :].count("\n")
        yield (
            f"{kind} {number} {where[1] or where[2]}+{line}",
            before + found.expand(replace) + after,
        )


MUTANTS = {
    "unchanged": TEXT,
    **dict(each(r"(threadgroup|simdgroup)_barrier\([^;]*\);", "", "no barrier")),
    # Conditions that keep a thread from an element beyond an edge.
    **dict(each(r"row \+ r < rows", "true", "no row guard")),
    **dict(each(r"column \+ c < columns", "true", "no column guard")),
    **dict(each(r"row \+ r < s\.rows", "true", "no row guard")),
    **dict(each(r"y_row < s\.rows", "true", "no row guard")),
    **dict(each(r"m >= s\.rows", "false", "no row guard")),
    **dict(each(r"column < s\.rank", "true", "no rank guard")),
    **dict(each(r"rank \+ \w+ < s\.rank", "true", "no rank guard")),
    **dict(each(r"row \+ r >= s\.in", "false", "no row guard")),
    **dict(each(r"column >= s\.rank", "false", "no rank guard")),
    **dict(each(r"(y_)?column( \+ \w+)? < s\.out(?!;)", "true", "no column guard")),
    **dict(each(r"(y_)?column( \+ \w+)? >= s\.out", "false", "no column guard")),
    # Elements and operands beside the right ones.
    **dict(each(r"(source|source\.data\)?)\[index\]", r"\1[index + 1]", "shifted")),
    **dict(each(r"\bh\[ulong\(", r"h[1 + ulong(", "shifted")),
    **dict(each(r"\by\[ulong\(", r"y[1 + ulong(", "shifted")),
    **dict(each(r"\[\[buffer\(1\)\]\]", "[[buffer(2)]]", "other operand")),
    **dict(each(r"\bw\[at", "w[1 + at", "shifted")),
    **dict(each(r"bias\[(y_)?column", r"bias[1 + \1column", "shifted")),
}


def run(text, folder, name):
    source = folder / f"{re.sub(r'[^a-z0-9]', '_', name.lower())}.metal"
    source.write_text(text)
    try:
        done = subprocess.run(
            [sys.executable, MUTANT],
            env=os.environ | {"METAL_EMULATOR_SOURCE": str(source), "METAL_EMULATOR_SEED": "5"},
            capture_output=True,
            encoding="utf-8",
            timeout=120,
        )
    except subprocess.TimeoutExpired:
        return "does not end"
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def results(emulated, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutants")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(lambda name: run(MUTANTS[name], folder, name), MUTANTS)
        return dict(zip(MUTANTS, done, strict=True))


def test_the_shaders_as_they_are_come_out_right(results):
    assert results["unchanged"] == "right"


@pytest.mark.parametrize("name", [name for name in MUTANTS if name != "unchanged"])
def test_a_mutant_is_caught(results, name):
    assert results[name].startswith("caught: "), results[name]
    if name.startswith("no barrier"):
        assert "race" in results[name]


def test_every_kind_of_mutant_is_there():
    """A renamed variable must not quietly empty a list above."""
    kinds = [re.sub(r" \d+ \S+$", "", name) for name in MUTANTS]
    assert kinds.count("no barrier") == len(re.findall(r"_barrier\(", TEXT)) >= 15
    assert kinds.count("other operand") == len(re.findall(r"\bkernel void", TEXT)) == 6
    for kind, least in {"no row guard": 5, "no rank guard": 4, "no column guard": 8}.items():
        assert kinds.count(kind) >= least, kind
