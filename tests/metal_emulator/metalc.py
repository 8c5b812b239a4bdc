"""Compiles a compute shader in the Metal Shading Language to a shared library for the emulator.

    python metalc.py [-DNAME=VALUE]... [-IFOLDER]... [--emit-source] SOURCE

prints the library's path, or with --emit-source the C++ that it is compiled from. SOURCE may be
`-`. Errors go to stderr, as clang words them, with the lines of SOURCE.

To clang a shader is C++ with attributes it does not know, but for three things, rewritten here:

- `threadgroup float tile[64];` in a kernel is one array for the whole threadgroup;
- `constant bool flag [[function_constant(0)]];` is a variable that the runtime sets;
- `float4(a, b, c, d)` makes a vector.

Kernels and function constants are listed in a table at the end (library.h), each kernel with a
function that hands it its arguments.

Libraries are cached in METAL_EMULATOR_CACHE, by default in the folder for temporary files, under
what went into them. METAL_EMULATOR_CLANG names the compiler.
"""

import argparse
import dataclasses
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
COMPILERS = ("clang++-16", "clang++-19", "clang++")
NAME = "program_source"  # what Metal calls source text in its messages


class ShaderError(Exception):
    """What is wrong with a shader, for a person to read."""


@dataclasses.dataclass(frozen=True)
class Argument:
    """An argument of a kernel.

    `device const float* x [[buffer(1)]]` has type "device const float*", name "x", attribute
    "buffer" and index 1; `uint lane [[thread_index_in_simdgroup]]` has no index.
    """

    type: str
    name: str
    attribute: str
    index: int | None


@dataclasses.dataclass(frozen=True)
class SharedArray:
    """A threadgroup variable that a kernel declares.

    `threadgroup float tile[4][N];` has type "float", name "tile" and dimensions "[4][N]".
    """

    type: str
    name: str
    dimensions: str


@dataclasses.dataclass(frozen=True)
class Kernel:
    """`kernel void name(arguments) { ... }`; spans are offsets into the source.

    `head` reaches from `kernel` to the closing parenthesis, `body` from brace to brace, and
    `declarations` are those of `shared`, a span for each statement and how many it declares.
    """

    name: str
    arguments: tuple[Argument, ...]
    shared: tuple[SharedArray, ...]
    head: tuple[int, int]
    body: tuple[int, int]
    declarations: tuple[tuple[tuple[int, int], int], ...]


@dataclasses.dataclass(frozen=True)
class FunctionConstant:
    """`constant type name [[function_constant(index)]];`, with the span of all of it."""

    type: str
    name: str
    index: int
    span: tuple[int, int]


# Arguments that are neither memory nor listed here are refused.
POSITIONS = {  # fields of Place with three coordinates
    "threadgroup_position_in_grid": "group",
    "threadgroups_per_grid": "groups",
    "thread_position_in_threadgroup": "position",
    "threads_per_threadgroup": "size",
    "dispatch_threads_per_threadgroup": "size",
    "thread_position_in_grid": None,
    "threads_per_grid": None,
}
SCALARS = {
    "thread_index_in_threadgroup": "place.index",
    "simdgroup_index_in_threadgroup": "place.simdgroup",
    "thread_index_in_simdgroup": "place.lane",
    "simdgroups_per_threadgroup": "place.simdgroups",
    "dispatch_simdgroups_per_threadgroup": "place.simdgroups",
    "threads_per_simdgroup": "32",
    "thread_execution_width": "32",
}


def parse(source: str) -> tuple[list[Kernel], list[FunctionConstant]]:
    """Finds the kernels and function constants of a shader.

    Macros are not expanded: where they make up a declaration, pass preprocessed text.

    Raises:
      ShaderError: a declaration is not understood.
    """
    text = _blank(source)
    constants = [
        FunctionConstant(_squeeze(m[1]), m[2], int(m[3]), m.span())
        for m in re.finditer(
            r"\bconstant\s+(?:const\s+)?([\w:]+)\s+(\w+)\s*"
            r"\[\[\s*function_constant\s*\(\s*(\d+)\s*\)\s*\]\]\s*;",
            text,
        )
    ]
    spans = {c.span for c in constants}
    for m in re.finditer(r"\bconstant\b([^;{}()]*)\[\[\s*function_constant\b[^;]*;", text):
        if m.span() not in spans:
            raise _error(source, m.start(), "this function constant is not understood")
    kernels = []
    for m in re.finditer(r"(?:\bkernel\b|\[\[\s*kernel\s*\]\])\s*", text):
        kernel = _kernel(source, text, m)
        if kernel is not None:
            kernels.append(kernel)
    in_kernels = sum(len(kernel.declarations) for kernel in kernels)
    everywhere = _threadgroup_declarations(source, text, 0, len(text))
    if len(everywhere) != in_kernels:
        bodies = [kernel.body for kernel in kernels]
        for m in everywhere:
            if not any(begin < m.start(1) < end for begin, end in bodies):
                raise _error(source, m.start(1), "only a kernel can declare threadgroup memory")
    return kernels, constants


def _kernel(source: str, text: str, start: re.Match) -> Kernel | None:
    head = re.compile(r"(?:\[\[[^\]]*\]\]\s*)*void\s+(?:\[\[[^\]]*\]\]\s*)*(\w+)\s*\(").match(
        text, start.end()
    )
    if head is None:
        raise _error(source, start.start(), "`kernel` is not followed by `void name(`")
    if re.search(r"\btemplate\s*<[^;{}]*>\s*(?:\[\[[^\]]*\]\]\s*)*$", text[: start.start()]):
        raise _error(source, start.start(), "templates of kernels are not supported")
    end = _closing(source, text, head.end() - 1)
    arguments = [
        _argument(source, text[begin:stop], begin)
        for begin, stop in _split(text, head.end(), end)
        if text[begin:stop].strip()
    ]
    body = re.compile(r"\s*(?:\[\[[^\]]*\]\]\s*)*([{;])").match(text, end + 1)
    if body is None:
        raise _error(source, end, f"the kernel {head[1]} has no body")
    if body[1] == ";":
        return None
    begin = body.end() - 1
    stop = _closing(source, text, begin) + 1
    shared: list[SharedArray] = []
    declarations = []
    for m in _threadgroup_declarations(source, text, begin, stop):
        names = _shared_names(source, m[2], m.start(2))
        shared += names
        declarations.append((m.span(1), len(names)))
    return Kernel(
        head[1],
        tuple(arguments),
        tuple(shared),
        (start.start(), end + 1),
        (begin, stop),
        tuple(declarations),
    )


def _threadgroup_declarations(source: str, text: str, begin: int, end: int) -> list[re.Match]:
    """The statements that make threadgroup memory, not those that make pointers to it."""
    found = []
    for m in re.compile(r"(?<=[{};:])\s*(threadgroup\b([^;{}]*))[;{]").finditer(text, begin, end):
        outside = re.sub(r"\[[^\]]*\]", "", m[2])
        if re.search(r"[*&]", outside):
            continue
        if re.search(r"[=(]", outside) or m[0][-1] == "{":
            raise _error(source, m.start(1), "threadgroup memory cannot be initialized")
        found.append(m)
    return found


def _argument(source: str, text: str, at: int) -> Argument:
    attributes = re.findall(r"\[\[(.*?)\]\]", text)
    rest = re.sub(r"\[\[.*?\]\]", " ", text)
    declared = re.fullmatch(r"\s*(.*?[\s*&>])(\w+)\s*", rest, re.DOTALL)
    if declared is None:
        raise _error(source, at, f"the argument `{_squeeze(text)}` is not understood")
    for attribute in ",".join(attributes).split(","):
        m = re.fullmatch(r"\s*(\w+)\s*(?:\(\s*(\w+)\s*\))?\s*", attribute)
        if m is None:
            continue
        if m[1] in ("buffer", "threadgroup") and m[2] is not None and m[2].isdigit():
            return Argument(_squeeze(declared[1]), declared[2], m[1], int(m[2]))
        if m[1] in POSITIONS or m[1] in SCALARS:
            return Argument(_squeeze(declared[1]), declared[2], m[1], None)
    raise _error(source, at, f"the argument `{_squeeze(text)}` has no attribute known here")


def _shared_names(source: str, text: str, at: int) -> list[SharedArray]:
    declarators = [text[begin:stop] for begin, stop in _split(text, 0, len(text))]
    first = re.fullmatch(r"\s*(.*?[\s>])(\w+)\s*((?:\[.*\])?)\s*", declarators[0], re.DOTALL)
    if first is None:
        raise _error(source, at, f"`threadgroup{text};` is not understood")
    result = [SharedArray(_squeeze(first[1]), first[2], _squeeze(first[3]))]
    for declarator in declarators[1:]:
        m = re.fullmatch(r"\s*(\w+)\s*((?:\[.*\])?)\s*", declarator, re.DOTALL)
        if m is None:
            raise _error(source, at, f"`threadgroup{text};` is not understood")
        result.append(SharedArray(result[0].type, m[1], _squeeze(m[2])))
    return result


def _blank(source: str) -> str:
    """The source with spaces for comments, strings and directives; offsets stay."""

    def spaces(m: re.Match) -> str:
        return re.sub(r"[^\n]", " ", m[0])

    return re.sub(
        r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|^[ \t]*#(?:\\\n|[^\n])*',
        spaces,
        source,
        flags=re.DOTALL | re.MULTILINE,
    )


def _closing(source: str, text: str, begin: int) -> int:
    depth = 0
    for at in range(begin, len(text)):
        if text[at] in "([{":
            depth += 1
        elif text[at] in ")]}":
            depth -= 1
            if depth == 0:
                return at
    raise _error(source, begin, f"this {text[begin]} is not closed")


def _split(text: str, begin: int, end: int) -> list[tuple[int, int]]:
    """The spans between the commas of text[begin:end] that are in no brackets."""
    spans = []
    depth = 0
    for at in range(begin, end):
        if text[at] in "([{<":
            depth += 1
        elif text[at] in ")]}>":
            depth -= 1
        elif text[at] == "," and depth == 0:
            spans.append((begin, at))
            begin = at + 1
    return [*spans, (begin, end)]


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def _error(source: str, at: int, message: str) -> ShaderError:
    line = 1
    name = NAME
    for each in source[:at].split("\n")[:-1]:
        marker = re.match(r'#\s*(?:line\s+)?(\d+)\s+"([^"]*)"', each)
        line = int(marker[1]) if marker else line + 1
        name = marker[2] if marker else name
    return ShaderError(f"{name}:{line}: error: {message}")


VECTORS = re.compile(
    r"\b((?:u?char|u?short|u?int|u?long|half|float|bfloat)[234]|vec\s*<[^<>;(){}]*>)(\s*)\("
)


def translate(source: str) -> str:
    """The C++ of a preprocessed shader."""
    kernels, constants = parse(source)
    edits = [(c.span, f"{c.type} {c.name};") for c in constants]
    text = _blank(source)
    for c in constants:
        m = re.search(rf"\bconstant\b[^;{{}}()]*=[^;{{}}]*\b{c.name}\b[^;{{}}]*;", text)
        if m:
            raise _error(source, m.start(), f"a constant made from the function constant {c.name}")
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


def _compiler() -> str:
    named = os.environ.get("METAL_EMULATOR_CLANG")
    for name in (named,) if named else COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    raise ShaderError(f"no {named or ' or '.join(COMPILERS)} is installed")


def _flags() -> list[str]:
    flags = [
        *("-O2", "-std=c++14", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
        # Wide accesses would be counted and checked as such.
        *("-fno-vectorize", "-fno-slp-vectorize"),
        "-ffp-contract=off",
        # As Metal: a literal such as 1.0 is a float, and pointers of any type may alias.
        *("-Xclang", "-cl-single-precision-constant", "-fno-strict-aliasing"),
        *("-Wno-unknown-attributes", "-Wno-unused-command-line-argument"),
        *("-Wno-pass-failed", "-Wno-c++17-extensions", "-Wno-user-defined-literals"),
        "-Werror=return-type",
        # Calls through the runtime's pointers may be barriers: no branch may duplicate them.
        *("-Xclang", "-fconvergent-functions"),
        # Each access is announced by a call, memcpy and memset included; nothing else of
        # AddressSanitizer: no shadow memory, no red zones, no library.
        "-fsanitize=kernel-address",
    ]
    for option in (
        *("asan-instrumentation-with-call-threshold=0", "asan-kernel-mem-intrinsic-prefix=1"),
        *("asan-stack=0", "asan-globals=0", "asan-opt-same-temp=0"),
        # Nor may they be duplicated after that.
        *("tail-dup-placement=0", "disable-tail-duplicate", "disable-early-taildup"),
    ):
        flags += ["-mllvm", f"-{option}"]
    if platform.machine() in ("x86_64", "AMD64"):
        # Half to float and back is an instruction of most x86 CPUs, and a slow function otherwise.
        flags += ["-march=native", "-Xclang", "-ffloat16-excess-precision=none"]
    return flags


def _cpu() -> str:
    try:
        return re.findall(r"^flags.*$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0]
    except (OSError, IndexError):
        return platform.machine()


def _cache() -> Path:
    named = os.environ.get("METAL_EMULATOR_CACHE")
    folder = Path(named or Path(tempfile.gettempdir()) / f"metal_emulator-{os.getuid()}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not named and folder.stat().st_uid != os.getuid():
        raise ShaderError(f"{folder} belongs to somebody else; set METAL_EMULATOR_CACHE")
    return folder


def _run(command: list[str], text: str) -> str:
    done = subprocess.run(command, input=text, capture_output=True, encoding="utf-8")
    if done.returncode != 0:
        raise ShaderError(done.stderr.strip())
    return done.stdout


def _translated(source: str, macros: Sequence[str], folders: Sequence[str]) -> str:
    """Preprocesses and translates; the words of metal_stdlib stay as they are."""
    command = [
        *(
            _compiler(),
            "-E",
            "-x",
            "c++",
            "-std=c++14",
            "-nostdinc",
            "-nostdinc++",
            "-D__METAL__=1",
        ),
        *("-D__METAL_VERSION__=310", "-DMETAL_EMULATOR_PREPROCESSING", f"-I{HERE / 'include'}"),
        *(f"-D{macro}" for macro in macros),
        *(f"-I{folder}" for folder in folders),
        "-",
    ]
    return translate(_run(command, f'#line 1 "{NAME}"\n{source}'))


def compile_shader(source: str, macros: Sequence[str] = (), folders: Sequence[str] = ()) -> Path:
    """The library of a shader, compiled unless it is in the cache.

    Args:
      source: Metal Shading Language.
      macros: "NAME=VALUE" or "NAME".
      folders: where `#include "file"` looks.

    Raises:
      ShaderError: it does not compile.
    """
    compiler = _compiler()
    status = os.stat(os.path.realpath(compiler))
    key = hashlib.sha256()
    parts = [source, *macros, compiler, str((status.st_mtime_ns, status.st_size)), _cpu()]
    parts += [file.read_text() for file in sorted((HERE / "include").iterdir())]
    parts += [(HERE / name).read_text() for name in ("library.h", "metalc.py")]
    if folders:  # whatever it includes is part of it
        parts.append(_translated(source, macros, folders))
    for part in parts:
        key.update(part.encode() + b"\0")
    library = _cache() / f"{key.hexdigest()[:32]}.so"
    if library.exists():
        return library
    code = _translated(source, macros, folders)
    # Renamed when it is whole: another process may compile the same.
    handle, made = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    try:
        command = [compiler, *_flags(), "-D__METAL_VERSION__=310", f"-I{HERE / 'include'}"]
        command += [f"-I{HERE}", "-shared", "-x", "c++", "-", "-o", made, "-lm"]
        _run(command, code)
        os.replace(made, library)
    finally:
        Path(made).unlink(missing_ok=True)
    return library


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("-D", dest="macros", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("-I", dest="folders", action="append", default=[], metavar="FOLDER")
    parser.add_argument("--emit-source", action="store_true", help="print the C++ and stop")
    parser.add_argument("source", help="a file, or - for stdin")
    options = parser.parse_args()
    folders = options.folders
    if options.source == "-":
        source = sys.stdin.read()
    else:
        source = Path(options.source).read_text()
        folders = [str(Path(options.source).parent), *folders]
    try:
        if options.emit_source:
            print(_translated(source, options.macros, folders))
        else:
            print(compile_shader(source, options.macros, folders))
    except ShaderError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
