"""The Metal backend compiles for macOS.

The PyPI package ziglang is a clang with the C headers of macOS, Apple's own objc/NSObject.h among
them, and a linker for its file format. What it lacks are the frameworks: Metal.h comes from the
emulator (test_metal_declarations.py holds it against Apple's) and Foundation.h from a few lines
beside it.
"""

import os
import shutil
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path

import jax
import pytest

pytest.importorskip("ziglang", reason="the PyPI package ziglang cross-compiles for macOS")

ROOT = Path(__file__).parents[1]
EMULATOR = ROOT / "tests" / "metal_emulator"
TARGET = ["-target", "aarch64-macos.13.0"]  # as old as JAX's own wheels


def run(*command, **options):
    # The first link compiles the compiler's runtime; it is kept for the next.
    cache = str(ROOT / "build" / "ziglang")
    variables = {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
    return subprocess.run(
        [str(part) for part in command],
        env=os.environ | variables,
        capture_output=True,
        encoding="utf-8",
        **options,
    )


def compile_source(source, output, *flags):
    return run(
        *(sys.executable, "-m", "ziglang", "c++", *TARGET),
        *("-std=c++17", "-Wall", "-Wextra", "-Werror", "-fno-objc-arc", "-fblocks"),
        *("-I", ROOT, "-isystem", jax.ffi.include_dir()),
        *("-I", EMULATOR, "-I", EMULATOR / "darwin"),
        *(*flags, "-c", source, "-o", output),
    )


class MachO:
    """Header and symbols of a 64-bit Mach-O file."""

    DYNAMIC_LOOKUP = 0xFE  # the library ordinal of a symbol looked for in all libraries

    def __init__(self, data: bytes):
        header = struct.unpack_from("<8I", data)
        self.magic, self.cpu, _, self.kind, commands = header[:5]
        self.exports: set[str] = set()
        self.imports: dict[str, int] = {}  # name -> library ordinal
        at = 32
        for _ in range(commands):
            command, size = struct.unpack_from("<2I", data, at)
            if command == 0x2:  # LC_SYMTAB
                self._symbols(data, *struct.unpack_from("<4I", data, at + 8))
            at += size

    def _symbols(self, data, offset, count, strings, _):
        for each in struct.iter_unpack("<IBBHQ", data[offset : offset + 16 * count]):
            name, kind, _, description, _ = each
            if not kind & 0x01:  # N_EXT
                continue
            begin = strings + name
            text = data[begin : data.index(b"\0", begin)].decode()
            if kind & 0x0E == 0:  # N_UNDF
                self.imports[text] = description >> 8
            elif not kind & 0x10:  # N_PEXT
                self.exports.add(text)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The backend without its Python face, for whose headers there is no macOS Python here."""
    folder = tmp_path_factory.mktemp("macos")
    cmake = shutil.which("cmake", path=sysconfig.get_path("scripts")) or "cmake"
    shader = f"-DROOT={ROOT}/shaders/lora.metal"
    script = ROOT / "native" / "metal" / "embed.cmake"
    run(cmake, shader, f"-DOUTPUT={folder}/shader_source.inc", "-P", script, check=True)
    objects = []
    for source in ("host.mm", "plan.cc"):
        objects.append(folder / f"{source}.o")
        done = compile_source(ROOT / "native" / "metal" / source, objects[-1], "-I", folder)
        assert done.returncode == 0, done.stderr
    output = folder / "metal.dylib"
    done = run(
        *(sys.executable, "-m", "ziglang", "cc", *TARGET),
        *("-shared", "-undefined", "dynamic_lookup", *objects, "-o", output),
    )
    assert done.returncode == 0, done.stderr
    return MachO(output.read_bytes())


def test_is_a_library_for_apple_silicon(library):
    assert library.magic == 0xFEEDFACF
    assert library.cpu == 0x0100000C  # CPU_TYPE_ARM64
    assert library.kind == 6  # MH_DYLIB


def test_exports_the_backend(library):
    assert "__ZN14jax_fused_lora11ThisBackendEv" in library.exports
    assert {name for name in library.exports if "11PlanForward" in name}
    assert {name for name in library.exports if "12PlanBackward" in name}


def test_imports_what_a_mac_has(library):
    assert {"_objc_msgSend", "_MTLCreateSystemDefaultDevice"} <= library.imports.keys()
    # What is not in libSystem, nor of the C++ runtime, is found in Foundation, Metal and libobjc.
    others = {
        name
        for name, ordinal in library.imports.items()
        if ordinal == MachO.DYNAMIC_LOOKUP
        and not name.startswith(("__Z", "___cxa_", "___gxx_", "_objc_", "_OBJC_CLASS_$_"))
    }
    assert others <= {"_MTLCreateSystemDefaultDevice", "___CFConstantStringClassReference"}
    declared = (EMULATOR / "Metal" / "Metal.h").read_text()
    declared += (EMULATOR / "darwin" / "Foundation" / "Foundation.h").read_text()
    classes = {name.partition("$_")[2] for name in library.imports if "_OBJC_CLASS_$_" in name}
    assert "MTLCompileOptions" in classes
    assert {name for name in classes if f"@interface {name} " not in declared} == set()


def test_a_method_that_metal_lacks_does_not_compile(tmp_path):
    source = tmp_path / "host.mm"
    source.write_text(
        "#import <Foundation/Foundation.h>\n"
        "#import <Metal/Metal.h>\n"
        "void F(id<MTLCommandBuffer> commands) { [commands commitAndForget]; }\n"
    )
    done = compile_source(source, tmp_path / "host.o")
    assert done.returncode != 0
    assert "commitAndForget" in done.stderr
