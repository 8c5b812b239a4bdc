"""The shaders' pointers: device, threadgroup, constant and thread memory are not mixed up.

The emulator compiles shaders as C++, to which a pointer is a pointer. C++ for OpenCL has Metal's
address spaces under other names, so that clang, in that mode, rejects what Metal's compiler
rejects.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHADERS = ROOT / "shaders"
HOST = (ROOT / "native" / "metal" / "host.mm").read_text()
MACRO = re.search(r'preprocessorMacros = @\{@"(\w+)"', HOST)[1]  # by which a shader gets its dtype
LIBRARY = Path(__file__).parent / "metal_emulator" / "address_spaces"
CLANG = shutil.which("clang++-19") or shutil.which("clang++-16")

if CLANG is None and os.environ.get("CI"):
    raise FileNotFoundError("neither clang++-19 nor clang++-16 is here")
pytestmark = pytest.mark.skipif(CLANG is None, reason="neither clang++-19 nor clang++-16 is here")


def complaints(source: Path, element: str) -> list[str]:
    """What is wrong with the address spaces of a shader for arrays of `element`."""
    done = subprocess.run(
        [
            *(str(CLANG), "-x", "clcpp", "-cl-std=clc++2021", "--target=spir64", "-fsyntax-only"),
            *("-Wno-unknown-attributes", "-Xclang", "-cl-ext=+cl_khr_fp16"),
            *("-D__METAL_VERSION__=310", f"-D{MACRO}={element}", "-isystem", str(LIBRARY)),
            *("-Xclang", "-ast-dump", "-fno-color-diagnostics", str(source)),
        ],
        capture_output=True,
        encoding="utf-8",
    )
    found = re.findall(r"^.*error: .*", done.stderr, re.M)
    # Metal wants every pointer's space named. To OpenCL an unnamed one is the generic space, into
    # which pointers of the others go. Only parameters of implicit constructors may be in it, which
    # have no name.
    unnamed = r"(?:ParmVar|Var|Field)Decl .* (?!used |referenced )(\w+) '[^']*__generic"
    return found + [f"no address space: {name}" for name in re.findall(unnamed, done.stdout)]


@pytest.mark.parametrize("element", ["float", "half", "bfloat"])
def test_shaders(element, tmp_path):
    for file in SHADERS.iterdir():
        # OpenCL has no constants that get their value when a pipeline is made.
        constant = r"^constant (\w+) (\w+) \[\[function_constant\(\d+\)\]\];"
        text = re.sub(constant, r"constant \1 \2 = 1;", file.read_text(), flags=re.M)
        (tmp_path / file.name).write_text(text)
    assert complaints(tmp_path / "lora.metal", element) == []


KERNEL = """
#include <metal_stdlib>
using namespace metal;
inline void sweep(threadgroup float* tile) { tile[0] = 1; }
kernel void f(constant uint& n [[buffer(0)]], device float* x [[buffer(1)]],
              device const float* y [[buffer(2)]], threadgroup float* m [[threadgroup(0)]]) {
  threadgroup float tile[64];
  thread float own = y[n];
  simdgroup_float8x8 a;
  %s
}
"""


@pytest.mark.parametrize(
    "right",
    [
        "sweep(tile); sweep(m + 8);",
        "x[0] = own + reinterpret_cast<device const char*>(y)[1];",
        "simdgroup_load(a, y, 8); simdgroup_store(a, tile, 8, ulong2(0), true);",
    ],
)
def test_right(right, tmp_path):
    source = tmp_path / "right.metal"
    source.write_text(KERNEL % right)
    assert complaints(source, "float") == []


@pytest.mark.parametrize(
    "wrong",
    [
        "sweep(x);",
        "sweep(&own);",
        "m = x;",
        "x = (device float*)m;",
        "x = reinterpret_cast<device float*>(tile);",
        "thread float* p = x;",
        "constant uint* p = &n; *p = 1;",
        "simdgroup_load(a, &own, 8);",
        "simdgroup_store(a, y, 8);",
        "float* p = m; *p = own;",
    ],
)
def test_wrong(wrong, tmp_path):
    source = tmp_path / "wrong.metal"
    source.write_text(KERNEL % wrong)
    assert complaints(source, "float") != []
