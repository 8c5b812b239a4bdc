#!/usr/bin/env bash
# Builds the product on Hopper's tensor cores and its test and runs it, on a machine with a Hopper GPU and CUDA 13's nvcc.
#
#   bash native/cuda/gemm_sm90_test.sh CUTLASS_INCLUDE [BUILD] [values | small | few | transposed]
#
# CUTLASS_INCLUDE holds cutlass/ and cute/ (PyPI nvidia-cutlass: cutlass_library/source/include).
# BUILD keeps the objects, build/gemm_sm90 unless said; `values` skips the times, `small` the large
# shapes too, for compute-sanitizer; `few` skips the times of many rows, `transposed` all but those
# of many rows with W transposed. CUBLAS may name the libcublas to compare with. NVCC and JOBS (16)
# as usual. Without a GPU it only builds.
set -euo pipefail
cutlass=$(realpath "${1:?folder of the CUTLASS headers}")
cd "$(dirname "$0")/../.."
build=${2:-build/gemm_sm90}
mkdir -p "$build"
nvcc=${NVCC:-nvcc}
flags=(-std=c++17 -O3 -DNDEBUG --expt-relaxed-constexpr -gencode=arch=compute_90a,code=sm_90a
  -Xcompiler -fPIC -I. "-I$cutlass")

compile() {  # object, source, flags
  local object=$1 source=$2
  shift 2
  [[ $object -nt $source && $object -nt native/cuda/gemm_sm90.h &&
    $object -nt native/cuda/gemm_sm90_kernel.h && $object -nt native/cuda/gpu.h &&
    $object -nt native/cuda/shrink_beside.h && $object -nt native/cuda/few_sm90.h &&
    $object -nt native/cuda/sweep_beside.h && $object -nt native/cuda/beside.cuh &&
    $object -nt native/cuda/store_sm90.cuh && $object -nt native/cuda/device.cuh ]] && return
  "$nvcc" "${flags[@]}" "$@" -c "$source" -o "$object.new" && mv "$object.new" "$object"
}

failed=0
wait_for() { while (($(jobs -rp | wc -l) >= $1)); do wait -n || failed=1; done; }
compile "$build/test.o" native/cuda/gemm_sm90_test.cu &
compile "$build/host.o" native/cuda/gemm_sm90.cc &
compile "$build/gpu.o" native/cuda/gpu.cc &
compile "$build/beside.o" native/cuda/shrink_beside.cu &
compile "$build/sweep.o" native/cuda/sweep_beside.cu &
compile "$build/few.o" native/cuda/few_sm90.cu &
for part in {0..19}; do
  wait_for "${JOBS:-16}"
  compile "$build/$part.o" native/cuda/gemm_sm90_kernel.cu -DJAX_FUSED_LORA_GEMM_PART="$part" &
done
for job in $(jobs -p); do wait "$job" || failed=1; done
((failed == 0)) || { echo "does not compile" >&2; exit 1; }
"$nvcc" "${flags[@]}" "$build"/{test,host,gpu,beside,sweep,few,{0..19}}.o -o "$build/gemm_sm90_test" -ldl

if [[ -z ${CUBLAS:-} ]]; then
  CUBLAS=$(python3 - <<'FIND' 2>/dev/null || true
import pathlib, sysconfig
found = sorted(pathlib.Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/lib/libcublas.so.*"))
print(found[-1] if found else "")
FIND
)
fi
if ! nvidia-smi >/dev/null 2>&1; then
  echo "built; no GPU here to run it on"
  exit
fi
CUBLAS=$CUBLAS "$build/gemm_sm90_test" ${3:+"$3"}
