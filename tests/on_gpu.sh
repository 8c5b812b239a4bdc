#!/usr/bin/env bash
# Usage: tests/on_gpu.sh OUT [CUTLASS [pytest's arguments...]]     (Linux, an NVIDIA GPU, CUDA's nvcc)
#
# Builds the CUDA backend on the machine it stands on, for that machine's GPU, and runs the shared
# suite with implementation="cuda" inside JAX there. CUTLASS is a folder of its headers; without it
# the library has no product of its own. python3 has jax with its CUDA plugin, flax, optax,
# nanobind, cmake, ninja, pytest, hypothesis and chex, on PYTHONPATH if need be. Logs go to OUT.
set -euo pipefail

cd "$(dirname "$0")/.."
[[ $# -ge 1 ]] || { sed -n 2p "$0" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
cutlass=${2:-OFF}
python=$(python3 -c 'import sys; print(sys.executable)')
package=$PWD/build/on_gpu/package
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)

nanobind=$(python3 -c 'import nanobind; print(nanobind.cmake_dir())')
cmake -S . -B build/on_gpu -G Ninja --log-level=WARNING -DCMAKE_BUILD_TYPE=Release \
  -DJAX_FUSED_LORA_CPU=OFF -DJAX_FUSED_LORA_CUDA=ON -DJAX_FUSED_LORA_CUTLASS="$cutlass" \
  -DCMAKE_CUDA_ARCHITECTURES="${capability/./}" -DPython_EXECUTABLE="$python" \
  -Dnanobind_DIR="$nanobind" >"$out/build.txt" 2>&1 &&
  cmake --build build/on_gpu >>"$out/build.txt" 2>&1 || { tail -n 40 "$out/build.txt"; exit 1; }
rm -rf "$package"
mkdir -p "$package"
cp -r jax_fused_lora "$package"
cmake --install build/on_gpu --prefix "$package" >/dev/null

export PYTHONPATH=$package:${PYTHONPATH:-} METAL_EMULATOR_LIBRARY=none
# JAX would take most of the GPU's memory at once; tests need little, and others may be there.
export XLA_PYTHON_CLIENT_PREALLOCATE=false
python3 -P -c 'import jax, jax_fused_lora as j; print(jax.devices(), j.implementations()["cuda"])'
tests=(tests/test_{ops,batch_axis,nnx,transformations,checkpoint,vmap}.py -k 'cuda')
python3 -P -m pytest -p no:cacheprovider -p no:benchmark "${@:3}" "${tests[@]}" >"$out/suite.txt" 2>&1 && status=0 || status=$?
tail -n 15 "$out/suite.txt"
exit "$status"
