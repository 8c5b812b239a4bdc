"""The emulator's Metal.h says what Apple's headers say.

Apple publishes its declarations a second time as metal-cpp, C++ headers that name every method with
its selector and types. They travel inside MLX's wheel for macOS, which pip fetches on any machine.
"""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

EMULATOR = Path(__file__).parent / "metal_emulator"
CACHE = Path(__file__).parents[1] / "build" / "mlx-metal"
WHEEL = "mlx-metal==0.32.4"


class Method(NamedTuple):
    selector: str
    result: str
    arguments: tuple[str, ...]


def spell(type_text: str) -> str:
    """A type as metal-cpp spells it, without the const that metal-cpp puts before any pointer."""
    text = re.sub(r"id<(MTL\w+)>", r"\1*", type_text)
    text = re.sub(r"\b(NS|MTL)(?=[A-Z])", r"\1::", text)
    text = re.sub(r"\bBOOL\b", "bool", text)
    text = re.sub(r"\bconst (?!void)|\bclass ", "", text)
    text = re.sub(r"\(\^\w*\)", "(^)", text)  # a block's own name and those of its arguments
    text = re.sub(r"\(([^()^]*)\)$", lambda match: f"({split(match[1], unnamed)})", text.strip())
    return re.sub(r"\s", "", text)


def unnamed(argument: str) -> str:
    """`const void* pointer` without `pointer`."""
    if block := re.fullmatch(r"(.*\(\^)\w*(\).*)", argument):
        return block[1] + block[2]
    return (
        re.sub(r"(?<=[\s*])\w+$", "", argument)
        if re.search(r"[\w*>] *\w+$", argument)
        else argument
    )


def split(arguments: str, each=lambda argument: argument) -> str:
    """Arguments joined again by commas, after `each`; commas in parentheses do not count."""
    return ",".join(each(argument.strip()) for argument in re.split(r",(?![^()]*\))", arguments))


def declared(header: str) -> dict[str, list[Method]]:
    """The methods of each protocol and interface of an Objective-C header."""
    text = re.sub(r"//.*", "", header)
    found: dict[str, list[Method]] = {}
    for name, body in re.findall(
        r"@(?:protocol|interface) (\w+) [:<][^\n]*\n(.*?)@end", text, re.S
    ):
        methods = found.setdefault(name, [])
        for attributes, kind, getter in re.findall(
            r"@property\(([^)]*)\)\s*([\w<>* ]+?[ *])(\w+);", body
        ):
            methods.append(Method(getter, spell(kind), ()))
            if "readwrite" in attributes:
                setter = f"set{getter[0].upper()}{getter[1:]}:"
                methods.append(Method(setter, "void", (spell(kind),)))
        for method in re.findall(r"^[-+] ?(.*?);", body, re.S | re.M):
            # A type in parentheses may hold parentheses itself: a block's.
            kind = r"\(((?:[^()]|\([^()]*\))*)\)"
            result, rest = re.fullmatch(rf"{kind}\s*(.*)", method, re.S).groups()
            parts = re.findall(rf"(\w+:)\s*{kind}", rest)
            selector = "".join(part for part, _ in parts) or rest.strip()
            methods.append(Method(selector, spell(result), tuple(spell(t) for _, t in parts)))
    return found


def enumerators(header: str) -> dict[str, tuple[str, int]]:
    """Each enumerator with its enumeration and value."""
    return {
        name: (enumeration, int(value))
        for enumeration, body in re.findall(
            r"NS_(?:ENUM|OPTIONS)\(\w+, (\w+)\) \{(.*?)\}", header, re.S
        )
        for name, value in re.findall(r"(\w+) = (\d+)", body)
    }


class Apple:
    """The declarations of metal-cpp."""

    def __init__(self, texts: dict[str, str]):
        # Metal's own header has no const before memory that it wraps and kernels write to.
        wrapped = "pointer, NS::UInteger length, MTL::ResourceOptions options, void (^deallocator)"
        self.text = "\n".join(texts.values()).replace(f"const void* {wrapped}", f"void* {wrapped}")
        # name in C++ -> selector
        self.selectors = dict(
            re.findall(r'_(?:MTL|NS)_PRIVATE_DEF_SEL\((\w+),\s*"([^"]+)"\)', self.text)
        )
        extends = r"^class (?:_\w+ )?(\w+) : public NS::Referencing<\w+, (\w+)>"
        self.bases = dict(re.findall(extends, self.text, re.M))
        self.methods: dict[str, list[Method]] = {}
        definition = re.compile(
            r"^_(?:MTL|NS)_INLINE (?P<result>[^\n(]+?)\s*\b(?P<class>(?:MTL|NS)::\w+)::\w+"
            r"\((?P<arguments>[^\n]*)\)(?: const)?\n\{\n(?P<body>.*?)^\}",
            re.S | re.M,
        )
        for match in definition.finditer(self.text):
            sent = re.search(r"_(?:MTL|NS)_PRIVATE_SEL\((\w+)\)", match["body"])
            if sent is None or sent[1] not in self.selectors:
                continue
            arguments = split(match["arguments"], lambda argument: spell(unnamed(argument)))
            types = re.split(r",(?![^()]*\))", arguments) if arguments else []
            self.methods.setdefault(match["class"].replace("::", ""), []).append(
                Method(self.selectors[sent[1]], spell(match["result"]), tuple(types))
            )
        self.values = {}
        for name, body in re.findall(
            r"_MTL_(?:ENUM|OPTIONS)\([\w:]+, (\w+)\) \{(.*?)\};", self.text, re.S
        ):
            for enumerator, value in re.findall(r"(\w+) = ([\w ]+)", body):
                if re.fullmatch(r"\d+", value):
                    self.values[f"MTL{enumerator}"] = (f"MTL{name}", int(value))

    def of(self, name: str) -> list[Method]:
        """The methods of a class and of those that it extends."""
        methods = list(self.methods.get(name, []))
        base = self.bases.get(name.removeprefix("MTL").removeprefix("NS"))
        return methods + (self.of(f"MTL{base}") if base else [])


@pytest.fixture(scope="module")
def apple():
    wheels = list(CACHE.glob("*.whl"))
    if not wheels:
        command = f"-m pip download --quiet --no-deps --only-binary=:all: --dest {CACHE} {WHEEL}"
        platform = "--platform macosx_14_0_arm64 --python-version 3.12"
        done = subprocess.run(
            [sys.executable, *command.split(), *platform.split()], capture_output=True, text=True
        )
        if done.returncode != 0:
            reason = f"pip cannot fetch {WHEEL}: {done.stderr.strip()[-300:]}"
            (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
        wheels = list(CACHE.glob("*.whl"))
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Apple(
            {
                name: wheel.read(name).decode()
                for name in wheel.namelist()
                if re.search(r"metal_cpp/(Foundation/NS|Metal/MTL(?!4))\w+\.hpp$", name)
            }
        )


METAL = (EMULATOR / "Metal" / "Metal.h").read_text()
FOUNDATION = (EMULATOR / "darwin" / "Foundation" / "Foundation.h").read_text()


def differences(header: str, apple: Apple) -> dict[str, str]:
    """What a header declares and Apple does not, and what Apple declares instead."""
    found = {}
    for name, methods in declared(header).items():
        for method in methods:
            theirs = [each for each in apple.of(name) if each.selector == method.selector]
            if method not in theirs:
                found[f"{name} {method.selector}"] = f"{method}, Apple's: {theirs}"
    for name, value in enumerators(header).items():
        if apple.values.get(name) != value:
            found[name] = f"{value}, Apple's: {apple.values.get(name)}"
    return found


def test_everything_is_parsed():
    methods = declared(METAL)
    assert len(methods) == METAL.count("\n@end")
    assert sum(map(len, methods.values())) == (
        len(re.findall(r"^[-+] ", METAL, re.M))
        + METAL.count("@property")
        + METAL.count("@property(readwrite")
    )
    assert len(enumerators(METAL)) == len(re.findall(r"^  MTL\w+ =", METAL, re.M))


def test_metal(apple):
    assert differences(METAL, apple) == {}


def test_functions_and_structures(apple):
    assert "id<MTLDevice> MTLCreateSystemDefaultDevice(void);" in METAL
    assert 'extern "C" MTL::Device* MTLCreateSystemDefaultDevice();' in apple.text
    assert "NSUInteger width, height, depth;\n} MTLSize;" in METAL
    size = re.search(r"\nstruct Size\n\{(.*?)\n\}", apple.text, re.S)[1]
    assert re.findall(r"^ +NS::UInteger (\w+);", size, re.M) == ["width", "height", "depth"]
    assert "typedef void (^MTLCommandBufferHandler)(id<MTLCommandBuffer>);" in METAL
    assert "using CommandBufferHandler = void (^)(CommandBuffer*);" in apple.text
    assert "using UInteger = std::uintptr_t;" in apple.text  # unsigned long, as NSUInteger is


def test_foundation(apple):
    # metal-cpp makes its strings another way, and has no generic types, so that a dictionary's keys
    # and values are any object to it.
    assert differences(FOUNDATION, apple).keys() == {
        "NSString stringWithUTF8String:",
        "NSDictionary dictionaryWithObjects:forKeys:count:",
    }
    assert "dictionaryWithObjects:forKeys:count:" in apple.selectors.values()
    assert "NSUInteger location, length;\n} NSRange;" in FOUNDATION
    members = re.search(r"\nstruct Range\n\{(.*?)\n\}", apple.text, re.S)[1]
    assert re.findall(r"^ +UInteger (\w+);", members, re.M) == ["location", "length"]


@pytest.mark.parametrize(
    "ours, wrong",
    [
        ("setBuffer:(id<MTLBuffer>)buffer offset", "bindBuffer:(id<MTLBuffer>)buffer offset"),
        ("offset:(NSUInteger)offset atIndex", "atIndex:(NSUInteger)offset offset"),
        ("atIndex:(NSUInteger)index;", "atIndex:(int)index;"),
        ("(void (^)(void* pointer, NSUInteger length))", "(void (^)(void* pointer))"),
        ("- (id<MTLCommandBuffer>)commandBuffer;", "- (id<MTLBuffer>)commandBuffer;"),
        ("@property(readonly) NSUInteger length;", "@property(readonly) NSUInteger size;"),
        ("newBufferWithBytes:(const void*)", "newBufferWithBytes:(void*)"),
        ("MTLDataTypeBool = 53", "MTLDataTypeBool = 54"),
        ("MTLCommandBufferStatusError = 5", "MTLCommandBufferStatusError = 6"),
        ("@protocol MTLLibrary <NSObject>", "@protocol MTLFunction <NSObject>"),
    ],
)
def test_a_wrong_declaration_is_found(apple, ours, wrong):
    assert ours in METAL
    assert differences(METAL.replace(ours, wrong, 1), apple)
