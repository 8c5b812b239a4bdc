"""Writes CUDA around the Metal shaders.

    python generate.py TYPE OUTPUT [--drop-barrier FILE:N]
    python generate.py --list-barriers

The shaders' text stays as it is, but for what CUDA cannot be told with a header (`metal_stdlib`
beside this file):

- function constants become `__constant__` variables, which the host sets before a launch;
- arrays of threadgroup memory become `__shared__`;
- the words `device` and `constant`, which mean something to CUDA, get an underscore;
- `[[...]]` attributes go, after the kernels' signatures have been read.

Each kernel stays a function. A `__global__` kernel that takes its operands as CUDA does calls it.
`#line` makes compilers and sanitizers speak of the shaders' own lines.
"""

import argparse
import re
from pathlib import Path
from typing import NamedTuple

SHADERS = Path(__file__).resolve().parents[2] / "shaders"

INCLUDE = re.compile(r'#include "(.*)"')
CONSTANT = re.compile(r"^constant (\w+) (\w+) \[\[function_constant\((\d+)\)\]\];", re.MULTILINE)
KERNEL = re.compile(r"\bkernel void (\w+)\((.*?\]\])\)\s*\{", re.DOTALL)
PARAMETER = re.compile(r"\s*(.+?)\s*\b(\w+) \[\[(\w+)(?:\((\d+)\))?\]\]", re.DOTALL)
SHARED = re.compile(r"^(\s+)threadgroup (\w+ \w+\[[^\]]+\];)", re.MULTILINE)
ATTRIBUTE = re.compile(r"\s*\[\[[^\]]*\]\]")
SPACE = re.compile(r"\b(device|constant)\b")
BARRIER = re.compile(r"\b(?:threadgroup|simdgroup)_barrier\([^)]*\);")

BUILT_IN = {
    "threadgroup_position_in_grid": "uint2{blockIdx.x, blockIdx.y}",
    "thread_index_in_threadgroup": "threadIdx.x",
    "simdgroup_index_in_threadgroup": "threadIdx.x / 32",
    "thread_index_in_simdgroup": "threadIdx.x % 32",
}


class Parameter(NamedTuple):
    type: str
    name: str
    attribute: str
    at: int


def flatten(name: str, drop: tuple[str, int] | None = None) -> str:
    """The text of a shader file with those that it includes, without its `drop`-th barrier."""
    text = (SHADERS / name).read_text()
    if drop and drop[0] == name:
        barriers = list(BARRIER.finditer(text))
        if not 1 <= drop[1] <= len(barriers):
            raise SystemExit(f"{name} has {len(barriers)} barriers, no number {drop[1]}")
        begin, end = barriers[drop[1] - 1].span()
        text = text[:begin] + ";" + text[end:]
    lines = [f'#line 1 "shaders/{name}"']
    for number, line in enumerate(text.splitlines(), start=1):
        included = INCLUDE.match(line)
        if line == "#pragma once":
            lines.append("")
        elif included and included[1] != "params.h":  # which kernels.h has included
            lines += [flatten(included[1], drop), f'#line {number + 1} "shaders/{name}"']
        else:
            lines.append(line)
    return "\n".join(lines)


def parameters(signature: str) -> list[Parameter]:
    found = []
    for text in signature.split(","):
        match = PARAMETER.fullmatch(text)
        if not match:
            raise SystemExit(f"not understood as a kernel's parameter: {text.strip()}")
        found.append(Parameter(match[1], match[2], match[3], int(match[4] or 0)))
    return found


def value(parameter: Parameter) -> str:
    """What the `__global__` kernel passes for a parameter."""
    if parameter.attribute == "threadgroup":
        return "dynamic_memory"
    if parameter.attribute != "buffer":
        return BUILT_IN[parameter.attribute]
    if parameter.at == 0:
        return "sizes"
    pointer = SPACE.sub(r"\1_", parameter.type)
    return f"static_cast<{pointer}>(arguments.at[{parameter.at}])"


def glue(name: str, signature: str) -> str:
    taken = parameters(signature)
    values = ",\n    ".join(value(parameter) for parameter in taken)
    dynamic = any(parameter.attribute == "threadgroup" for parameter in taken)
    memory = "  extern __shared__ float dynamic_memory[];\n" if dynamic else ""
    return (
        f"__global__ void {name}_kernel(const Sizes sizes, const Arguments arguments) {{\n"
        f"{memory}  {name}(\n    {values});\n}}\n"
    )


def generate(element: str, drop: tuple[str, int] | None = None) -> str:
    source = flatten("lora.metal", drop)
    kernels = KERNEL.findall(source)
    constants = CONSTANT.findall(source)
    expected = len(re.findall(r"\bkernel void\b", source)), source.count("[[function_constant")
    if expected != (len(kernels), len(constants)):
        raise SystemExit(
            f"read {len(kernels)} kernels and {len(constants)} constants of {expected}"
        )

    text = CONSTANT.sub(r"__constant__ \1 \2;", source)
    text = SHARED.sub(r"\1__shared__ \2", text)
    text = SPACE.sub(r"\1_", ATTRIBUTE.sub("", text))
    launchers = "\n".join(glue(name, signature) for name, signature in kernels)
    table = "\n".join(f'    {{"{name}", {name}_kernel}},' for name, _ in kernels)
    cases = "\n".join(
        f"    case {index}:\n      return cudaMemcpyToSymbol({name}, value, sizeof({name}));"
        for _, name, index in constants
    )
    return f"""\
// Written by tests/metal_on_cuda/generate.py.
#include "kernels.h"

// Before the namespace, in which the shaders' own lines for these then do nothing.
#include <metal_stdlib>
#include <metal_simdgroup_matrix>

#define ELEMENT {element}

namespace {{

{text}

#line 1 "glue for {element}"
{launchers}
cudaError_t SetConstant(int index, const void* value) {{
  switch (index) {{
{cases}
    default:
      return cudaErrorInvalidSymbol;
  }}
}}

}}  // namespace

Shaders {element.capitalize()}Shaders() {{
  return {{{{
{table}
  }}, SetConstant}};
}}
"""


def list_barriers() -> None:
    """Prints, for each barrier, what --drop-barrier calls it and the line it is on."""
    for path in sorted(SHADERS.iterdir()):
        if path.suffix not in (".h", ".metal"):
            continue
        text = path.read_text()
        for number, match in enumerate(BARRIER.finditer(text), start=1):
            print(f"{path.name}:{number} {text.count(chr(10), 0, match.start()) + 1}")


def barrier(text: str) -> tuple[str, int]:
    name, _, number = text.partition(":")
    return name, int(number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("type", nargs="?", choices=["float", "half", "bfloat"])
    parser.add_argument("output", nargs="?", type=Path)
    parser.add_argument("--list-barriers", action="store_true", help="with the lines they are on")
    parser.add_argument(
        "--drop-barrier",
        type=barrier,
        metavar="FILE:N",
        help="leave out the N-th barrier (from 1) of a shader file, which racecheck should notice",
    )
    arguments = parser.parse_args()
    if arguments.list_barriers:
        return list_barriers()
    if arguments.output is None:
        parser.error("needed: TYPE OUTPUT")
    arguments.output.write_text(generate(arguments.type, arguments.drop_barrier))


if __name__ == "__main__":
    main()
