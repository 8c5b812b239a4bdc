"""Compiles a compute shader in the Metal Shading Language to a shared library for the emulator.

    python metalc.py [-DNAME=VALUE]... [-IFOLDER]... [--emit-source] SOURCE

prints the library's path, or with --emit-source the C++ that it is compiled from. SOURCE may be
`-`. Errors go to stderr, as clang words them, with the lines of SOURCE.

Libraries are cached in METAL_EMULATOR_CACHE, by default in the folder for temporary files, under
what went into them. METAL_EMULATOR_CLANG names the compiler.
"""

import argparse
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

from metal_source import NAME, ShaderError
from metal_to_cxx import translate

HERE = Path(__file__).parent
COMPILERS = ("clang++-16", "clang++-19", "clang++")


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
    parts += [file.read_text() for file in (HERE / "library.h", *sorted(HERE.glob("metal*.py")))]
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
        command = [compiler, *_flags(), "-D__METAL_VERSION__=310", f"-I{HERE}"]
        command += [f"-isystem{HERE / 'include'}", "-shared", "-x", "c++", "-", "-o", made, "-lm"]
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
