"""Makes C++ of a compute shader in the Metal Shading Language.

To clang a shader is C++ with attributes it does not know, but for three things, rewritten here:

- `threadgroup float tile[64];` in a kernel is one array for the whole threadgroup;
- `constant bool flag [[function_constant(0)]];` is a variable that the runtime sets;
- `float4(a, b, c, d)` makes a vector.

Kernels and function constants are listed in a table at the end (library.h), each kernel with a
function that hands it its arguments.
"""

import re

from metal_source import POSITIONS, SCALARS, FunctionConstant, Kernel, blank, error, parse

VECTORS = re.compile(
    r"\b((?:u?char|u?short|u?int|u?long|half|float|bfloat)[234]|vec\s*<[^<>;(){}]*>)(\s*)\("
)


def translate(source: str) -> str:
    """The C++ of a preprocessed shader.

    Raises:
      ShaderError: a declaration is not understood.
    """
    kernels, constants = parse(source)
    edits = [(c.span, f"{c.type} {c.name};") for c in constants]
    text = blank(source)
    for c in constants:
        m = re.search(rf"\bconstant\b[^;{{}}()]*=[^;{{}}]*\b{c.name}\b[^;{{}}]*;", text)
        if m:
            raise error(source, m.start(), f"a constant made from the function constant {c.name}")
    for number, kernel in enumerate(kernels):
        index = 0
        for span, count in kernel.declarations:
            code = ""
            for array in kernel.shared[index : index + count]:
                code += (
                    f"typedef {array.type} {array.name}_of_threadgroup{array.dimensions}; "
                    f"{array.name}_of_threadgroup& {array.name} = *metal_emulator::SharedArray<"
                    f"{number}, {index}, {array.name}_of_threadgroup>::get(); "
                )
                index += 1
            # The declaration may span lines, and its semicolon stays.
            edits.append((span, code.rstrip("; ") + "\n" * source.count("\n", *span)))
    for kernel in kernels:  # clang knows none of the attributes
        for m in re.compile(r"\[\[.*?\]\]").finditer(text, *kernel.head):
            edits.append((m.span(), ""))
    for m in VECTORS.finditer(text):
        edits.append((m.span(1), f"metal_emulator::make<{m[1]}>"))
    for (begin, end), code in sorted(edits, reverse=True):
        source = source[:begin] + code + source[end:]
    return f"#include <metal_stdlib>\n{source}\n{_tables(kernels, constants)}"


def _tables(kernels: list[Kernel], constants: list[FunctionConstant]) -> str:
    code = ['# 1 "tables"', "namespace {"]
    rows = []
    for number, kernel in enumerate(kernels):
        values = []
        lists: dict[str, list[str]] = {"buffer": [], "threadgroup": []}
        for a in kernel.arguments:
            if a.attribute in lists:
                # Only memory that is not const can be written to.
                writable = not re.search(r"\b(const|constant)\b", a.type)
                lists[a.attribute].append(f'{{{a.index}, "{a.name}", {str(writable).lower()}}}')
                whose = f"{a.attribute}s[{a.index}]"
                if a.type.endswith("&"):
                    values.append(f"*reinterpret_cast<std::remove_reference_t<{a.type}>*>({whose})")
                else:
                    values.append(f"reinterpret_cast<{a.type}>({whose})")
            else:
                kind = f"std::remove_cv_t<{a.type}>"
                if a.attribute in SCALARS:
                    values.append(f"static_cast<{kind}>({SCALARS[a.attribute]})")
                else:
                    field = POSITIONS[a.attribute]
                    which = f"place.{field}" if field else a.attribute
                    values.append(f"metal_emulator::position<{kind}>({which})")
        code += [
            f'__attribute__((no_sanitize("address"))) void enter_{number}(void* const* buffers, '
            "void* const* threadgroups, const metal_emulator::Place& place) {",
            "  const uint32_t thread_position_in_grid[] = {"
            + ", ".join(
                f"place.group[{i}] * place.size[{i}] + place.position[{i}]" for i in range(3)
            )
            + "};",
            "  const uint32_t threads_per_grid[] = {"
            + ", ".join(f"place.groups[{i}] * place.size[{i}]" for i in range(3))
            + "};",
            "  (void)buffers, (void)threadgroups, (void)thread_position_in_grid;",
            "  (void)threads_per_grid;",
            f"  ::{kernel.name}({', '.join(values)});",
            "}",
            f"metal_emulator::Shared shared_{number}[] = {{"
            + "".join(f'{{"{array.name}", 0}}, ' for array in kernel.shared)
            + "{}};",
        ]
        for what, items in lists.items():
            items = [*items, "{}"]
            code.append(
                f"const metal_emulator::Buffer {what}s_{number}[] = {{{', '.join(items)}}};"
            )
        rows.append(
            f'{{"{kernel.name}", enter_{number}, buffers_{number}, {len(lists["buffer"])}, '
            f"threadgroups_{number}, {len(lists['threadgroup'])}, shared_{number}, "
            f"{len(kernel.shared)}}}"
        )
    listed = [f'{{{c.index}, "{c.name}", &{c.name}, sizeof {c.name}}}' for c in constants]
    code += [
        f"const metal_emulator::Kernel kernels[] = {{{', '.join([*rows, '{}'])}}};",
        f"const metal_emulator::Constant constants[] = {{{', '.join([*listed, '{}'])}}};",
        "}  // namespace",
        "metal_emulator::Shared* const metal_emulator::shared_of_kernel[] = {"
        + ", ".join([*(f"shared_{i}" for i in range(len(kernels))), "nullptr"])
        + "};",
        # The linker's own symbols.
        'extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start[], _end[];',
        'extern "C" __attribute__((visibility("default"))) const metal_emulator::Exports '
        "metal_emulator_exports = {",
        f"    kernels, {len(kernels)}, constants, {len(constants)}, __ehdr_start, _end, "
        "&metal_emulator::runtime};",
        "",
    ]
    return "\n".join(code)
