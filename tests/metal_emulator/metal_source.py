"""Reads what a compute shader in the Metal Shading Language declares: kernels and constants."""

import dataclasses
import re

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
    text = blank(source)
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
            raise error(source, m.start(), "this function constant is not understood")
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
                raise error(source, m.start(1), "only a kernel can declare threadgroup memory")
    return kernels, constants


def _kernel(source: str, text: str, start: re.Match) -> Kernel | None:
    head = re.compile(r"(?:\[\[[^\]]*\]\]\s*)*void\s+(?:\[\[[^\]]*\]\]\s*)*(\w+)\s*\(").match(
        text, start.end()
    )
    if head is None:
        raise error(source, start.start(), "`kernel` is not followed by `void name(`")
    if re.search(r"\btemplate\s*<[^;{}]*>\s*(?:\[\[[^\]]*\]\]\s*)*$", text[: start.start()]):
        raise error(source, start.start(), "templates of kernels are not supported")
    end = _closing(source, text, head.end() - 1)
    arguments = [
        _argument(source, text[begin:stop], begin)
        for begin, stop in _split(text, head.end(), end)
        if text[begin:stop].strip()
    ]
    body = re.compile(r"\s*(?:\[\[[^\]]*\]\]\s*)*([{;])").match(text, end + 1)
    if body is None:
        raise error(source, end, f"the kernel {head[1]} has no body")
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
            raise error(source, m.start(1), "threadgroup memory cannot be initialized")
        found.append(m)
    return found


def _argument(source: str, text: str, at: int) -> Argument:
    attributes = re.findall(r"\[\[(.*?)\]\]", text)
    rest = re.sub(r"\[\[.*?\]\]", " ", text)
    declared = re.fullmatch(r"\s*(.*?[\s*&>])(\w+)\s*", rest, re.DOTALL)
    if declared is None:
        raise error(source, at, f"the argument `{_squeeze(text)}` is not understood")
    for attribute in ",".join(attributes).split(","):
        m = re.fullmatch(r"\s*(\w+)\s*(?:\(\s*(\w+)\s*\))?\s*", attribute)
        if m is None:
            continue
        if m[1] in ("buffer", "threadgroup") and m[2] is not None and m[2].isdigit():
            return Argument(_squeeze(declared[1]), declared[2], m[1], int(m[2]))
        if m[1] in POSITIONS or m[1] in SCALARS:
            return Argument(_squeeze(declared[1]), declared[2], m[1], None)
    raise error(source, at, f"the argument `{_squeeze(text)}` has no attribute known here")


def _shared_names(source: str, text: str, at: int) -> list[SharedArray]:
    declarators = [text[begin:stop] for begin, stop in _split(text, 0, len(text))]
    first = re.fullmatch(r"\s*(.*?[\s>])(\w+)\s*((?:\[.*\])?)\s*", declarators[0], re.DOTALL)
    if first is None:
        raise error(source, at, f"`threadgroup{text};` is not understood")
    result = [SharedArray(_squeeze(first[1]), first[2], _squeeze(first[3]))]
    for declarator in declarators[1:]:
        m = re.fullmatch(r"\s*(\w+)\s*((?:\[.*\])?)\s*", declarator, re.DOTALL)
        if m is None:
            raise error(source, at, f"`threadgroup{text};` is not understood")
        result.append(SharedArray(result[0].type, m[1], _squeeze(m[2])))
    return result


def blank(source: str) -> str:
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
    raise error(source, begin, f"this {text[begin]} is not closed")


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


def error(source: str, at: int, message: str) -> ShaderError:
    line = 1
    name = NAME
    for each in source[:at].split("\n")[:-1]:
        marker = re.match(r'#\s*(?:line\s+)?(\d+)\s+"([^"]*)"', each)
        line = int(marker[1]) if marker else line + 1
        name = marker[2] if marker else name
    return ShaderError(f"{name}:{line}: error: {message}")
