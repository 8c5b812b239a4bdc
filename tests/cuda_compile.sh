#!/usr/bin/env bash
# Usage: tests/cuda_compile.sh BIN BUILD
#
# Compiles the CUDA backend for an H100, links and loads it, so that it cannot rot where no GPU is.
# BIN is the folder of a Python environment with tests/requirements.txt. Of the Hopper product, whose
# twenty variants take minutes, two: W straight in float16 and transposed in bfloat16.
set -euo pipefail
cd "$(dirname "$0")/.."
[[ $# -eq 2 ]] || { sed -n 2p "$0" >&2; exit 2; }
bin=$(realpath -s "$1") build=$2

nvcc=$(command -v nvcc || ls -d /usr/local/cuda*/bin/nvcc 2>/dev/null | tail -n 1 || true)
if [[ ! $nvcc ]]; then
  echo 'cuda: not compiled, there is no nvcc'
  [[ ! ${CI:-} ]]
  exit
fi

"$bin/cmake" -S . -B "$build" -G Ninja --log-level=WARNING -DCMAKE_MAKE_PROGRAM="$bin/ninja" \
  -DCMAKE_BUILD_TYPE=Release -DJAX_FUSED_LORA_CPU=OFF -DJAX_FUSED_LORA_CUDA=ON \
  -DJAX_FUSED_LORA_CUTLASS=OFF \
  -DCMAKE_CUDA_COMPILER="$nvcc" -DCMAKE_CUDA_ARCHITECTURES=90 \
  -DPython_EXECUTABLE="$bin/python" \
  -Dnanobind_DIR="$("$bin/python" -c 'import nanobind; print(nanobind.cmake_dir())')"
"$bin/cmake" --build "$build"
# The linker lets a module's symbols be undefined, as Python's are; loading it does not.
PYTHONPATH=$build/native/cuda "$bin/python" -c 'import _cuda'

# The headers alone, out of the wheel: a build requirement of nobody else.
"$bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$build" \
  'nvidia-cutlass==4.2.*'
cutlass=$build/cutlass
"$bin/python" -m zipfile -e "$build"/nvidia_cutlass-*.whl "$cutlass"
compile() {  # name, source, flags
  "$nvcc" -std=c++17 -O3 -DNDEBUG --expt-relaxed-constexpr -gencode=arch=compute_90a,code=sm_90a \
    -Xcompiler -fPIC -I. "-I$cutlass/cutlass_library/source/include" "${@:3}" -c "native/cuda/$2" \
    -o "$build/$1.o"
}
jobs=()
for source in few_sm90.cu shrink_beside.cu sweep_beside.cu gemm_sm90.cc; do
  compile "${source%.*}" "$source" &
  jobs+=($!)
done
for part in 1 2; do
  compile "gemm_$part" gemm_sm90_kernel.cu "-DJAX_FUSED_LORA_GEMM_PART=$part" &
  jobs+=($!)
done
for job in "${jobs[@]}"; do wait "$job"; done
echo 'cuda: compiles'
