#!/usr/bin/env bash
# Usage: tests/sanitize.sh PYTHON     (Linux; GCC, or what CXX names)
#
# The C++ tests and a part of tests/test_ops.py under AddressSanitizer and UBSan, and the hand-out
# of blocks to threads under ThreadSanitizer. Fails where a test fails or a sanitizer reports.
# PYTHON has the package's and the tests' requirements; what is installed in it stays as it is.
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

# The sanitizers' runtimes come before everything else in the process; libstdc++ comes with them,
# as they look for its functions when they start.
runtimes=$(ldd "$package"/jax_fused_lora/_cpu.*.so |
  awk '/lib(clang_rt\.)?(asan|ubsan)|libstdc\+\+/ { print $3 }' | paste -sd: -)
[[ $runtimes == *asan* ]] || { echo "no shared AddressSanitizer runtime: $runtimes" >&2; exit 1; }

# -S runs no .pth file: the import hook of an editable install would win over any path. -P keeps
# the source folder, which has no native library, out of the path. Python does not free everything
# at its end, and parts of jaxlib carry their own operator new.
PYTHONPATH=$package:$site LD_PRELOAD=$runtimes \
  ASAN_OPTIONS=$ASAN_OPTIONS:detect_leaks=0:alloc_dealloc_mismatch=0 \
  "$python" -S -P - "$package" <<'PYTHON'
import pathlib
import sys

import pytest

import jax_fused_lora._cpu
from jax_fused_lora import implementations

library = pathlib.Path(jax_fused_lora._cpu.__file__)
print("library:", library, flush=True)
assert library.is_relative_to(sys.argv[1]), "not the sanitized library"
assert implementations()["cpu"].available, implementations()["cpu"].reason
tests = "(test_shapes or test_results_overwrite) and not xla"
# Captured by file descriptor, a sanitizer's report would be lost with the process.
options = ["--capture=sys", "-p", "no:cacheprovider", "-k", tests]
sys.exit(pytest.main(["tests/test_ops.py", *options]))
PYTHON
echo 'sanitize: no error found'
