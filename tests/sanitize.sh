#!/usr/bin/env bash
# Usage: tests/sanitize.sh PYTHON     (Linux; GCC, or what CXX names)
#
# The C++ tests and a part of the tests in Python under AddressSanitizer and UBSan, of the CPU's
# calls, with the instruction sets that this CPU has, and of the Metal backend's host, emulated; the
# hand-out of blocks to threads under ThreadSanitizer. Fails where a test fails or a sanitizer
# reports.
# PYTHON has the package's and the tests' requirements; what is installed in it stays as it is. The
# emulator takes what `make .venv/emulator` installs.
set -euo pipefail

cd "$(dirname "$0")/.."
python=$1
root=$PWD/build/sanitize
PATH=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH
site=$("$python" -c 'import sysconfig as s; print(s.get_path("purelib"), s.get_path("platlib"), sep=":")')

build() {  # sanitizers, targets...
  local sanitizers=$1
  shift
  cmake -S . -B "$root/$sanitizers" -G Ninja --log-level=WARNING \
    -DCMAKE_BUILD_TYPE=Debug -DJAX_FUSED_LORA_TESTS=ON -DJAX_FUSED_LORA_SANITIZE="$sanitizers" \
    -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" \
    -Dnanobind_DIR="$("$python" -m nanobind --cmake_dir)"
  cmake --build "$root/$sanitizers" --target "$@"
}

export ASAN_OPTIONS=strict_init_order=1:detect_stack_use_after_return=1
export UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS=halt_on_error=1

echo '== Blocks and threads, under ThreadSanitizer'
build thread parallel_test
# GCC's older ThreadSanitizers cannot place their shadow memory where addresses are randomized as
# widely as new kernels do it.
fixed=(setarch "$(uname -m)" -R)
"${fixed[@]}" true 2>/dev/null || fixed=()
"${fixed[@]}" "$root/thread/native/cpu/parallel_test"

echo '== Kernels, under AddressSanitizer and UBSan'
package=$root/package
rm -rf "$package"
mkdir -p "$package"
cp -r jax_fused_lora "$package"
build address,undefined kernels_test parallel_test _cpu
"$root/address,undefined/native/cpu/parallel_test"
"$root/address,undefined/native/cpu/kernels_test"

echo '== Calls inside JAX, under AddressSanitizer and UBSan'
cmake --install "$root/address,undefined" --prefix "$package" >/dev/null

# Runs tests in Python with a library that is among its packages. The sanitizers' runtimes come
# before everything else in the process; libstdc++ comes with them, as they look for its functions
# when they start.
#
# -S runs no .pth file: the import hook of an editable install would win over any path. -P keeps
# the source folder, which has no native library, out of the path. Python does not free everything
# at its end, and parts of jaxlib carry their own operator new.
inside_jax() {  # the folder of packages, the library, more for ASAN_OPTIONS, pytest's arguments...
  local packages=$1 library=$2 options=$3 runtimes
  runtimes=$(ldd "$library" | awk '/lib(clang_rt\.)?(asan|ubsan)|libstdc\+\+/ { print $3 }' |
    paste -sd: -)
  [[ $runtimes == *asan* ]] || { echo "no shared AddressSanitizer runtime: $runtimes" >&2; exit 1; }
  PYTHONPATH=$packages:$site LD_PRELOAD=$runtimes \
    ASAN_OPTIONS=$ASAN_OPTIONS:detect_leaks=0:alloc_dealloc_mismatch=0$options \
    "$python" -S -P - "$library" "${@:4}" <<'PYTHON'
import sys

import pytest

# Captured by file descriptor, a sanitizer's report would be lost with the process.
failed = pytest.main(["--capture=sys", "-p", "no:cacheprovider", *sys.argv[2:]])
library = sys.argv[1]
loaded = {getattr(module, "__file__", None) for module in sys.modules.values()}
assert library in loaded, f"{library} is not what was tested"
sys.exit(failed)
PYTHON
}
METAL_EMULATOR_LIBRARY=none inside_jax "$package" "$(echo "$package"/jax_fused_lora/_cpu.*.so)" '' \
  tests/test_ops.py -k '(test_shapes or test_results_overwrite) and cpu'

echo '== The Metal host inside JAX, emulated, under AddressSanitizer and UBSan'
cmake -S tests/metal_emulator -B "$root/metal" -G Ninja --log-level=WARNING \
  -DCMAKE_BUILD_TYPE=Debug -DJAX_FUSED_LORA_SANITIZE=address,undefined \
  -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" \
  -Dnanobind_DIR="$("$python" -m nanobind --cmake_dir)"
cmake --build "$root/metal" --target _metal
metal=$(echo "$root"/metal/_metal.*.so)
# Beside the CPU's library as it is installed: two compilers' sanitizers cannot share a process.
plain=$root/plain
rm -rf "$plain"
mkdir -p "$plain"
cp -r jax_fused_lora "$plain"
installed=$("$python" -c 'import jax_fused_lora._cpu as cpu; print(cpu.__file__)')
cp "$(dirname "$installed")"/*.so* "$plain/jax_fused_lora"
# The emulator's threads are fibers, whose stacks AddressSanitizer does not know.
METAL_EMULATOR_LIBRARY=$metal inside_jax "$plain" "$metal" :detect_stack_use_after_return=0 \
  tests/test_ops.py tests/test_errors.py tests/test_metal.py \
  -k '(test_shapes and metal-1) or (test_native and metal) or threads or are_copied or fails'
echo 'sanitize: no error found'
