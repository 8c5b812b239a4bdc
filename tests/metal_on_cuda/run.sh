#!/usr/bin/env bash
# Usage: tests/metal_on_cuda/run.sh OUT [PYTHON]     (Linux, an NVIDIA GPU, CUDA's nvcc)
#
# The Metal shaders, compiled as CUDA, do on an NVIDIA GPU what native/metal/plan.cc says. PYTHON
# (python3) is one that has JAX, for XLA's headers. Logs, and a summary, go to the folder OUT.
#
# What it shows, of the shaders' own text and the plans that the Mac follows:
#   - every result is right by the rule of jax_fused_lora/accuracy.py, in three dtypes, on odd and
#     even shapes, with the real parallelism of a GPU, and no element is left unwritten;
#   - no kernel touches anything outside its operands (memcheck, each operand being a block of its
#     own), nor asks for more threadgroup memory than Apple's GPUs have;
#   - threads agree on threadgroup memory (racecheck) and all reach each barrier (synccheck);
#   - these tools would notice: racecheck, each barrier of the shaders left out in turn; memcheck,
#     operands two bytes short.
# What it does not: that Apple's compiler takes the text, anything about Apple's own
# simdgroup_matrix, memory model, speed or limits on registers, or native/metal/host.mm. Reads of
# threadgroup memory that nobody wrote go unnoticed unless they spoil a result.
set -uo pipefail

cd "$(dirname "$0")/../.."
[[ $# -ge 1 ]] || { sed -n 2p "$0" >&2; exit 2; }
source tests/cuda_tools.sh "$1"
python=${2:-python3}
here=tests/metal_on_cuda
ffi=${XLA_FFI_INCLUDE:-$("$python" -c 'import jax.ffi; print(jax.ffi.include_dir())')} || exit 2
flags=(-std=c++17 -O2 -Xcompiler -Wall -I "$here" -I . -I shaders -isystem "$ffi")

# Compiles what generate.py writes for a type and any more of its arguments.
compile_shaders() {  # object, type, ...
  local object=$1
  shift
  "$python" "$here/generate.py" "$1" "$object.cu" "${@:2}" &&
    "$nvcc" "${flags[@]}" "${target[@]}" -lineinfo -c "$object.cu" -o "$object"
}

# Builds and checks the shaders without one of their barriers, in one line for the summary.
mutant() {  # FILE:N, the line it is on
  local name=${1/:/_} object log=$build/${1/:/_}.log
  object=$build/$name.o
  if ! compile_shaders "$object" float --drop-barrier "$1" >"$log" 2>&1 ||
    ! "$nvcc" "$object" "$build"/{half,bfloat,run,plan}.o -o "$build/$name" >>"$log" 2>&1; then
    echo "BROKEN $1 (line $2): does not build"
  else
    timeout 90 "$sanitizer" --tool racecheck --racecheck-report all --print-limit 5 \
      "$build/$name" --small --dtype float32 >"$log" 2>&1
    # With thousands of hazards to tell, the tool may not come to its summary in time.
    local hazard
    if hazard=$(grep -m 1 -oE 'Potential .* hazard|Race reported .*' "$log"); then
      echo "noticed $1 (line $2): $hazard"
    else
      echo "UNNOTICED $1 (line $2): $(grep -m 1 -oE 'RACECHECK SUMMARY.*' "$log" || tail -n 1 "$log")"
    fi
  fi
}

# One of compute-sanitizer's tools on the small shapes, all dtypes.
tool() {  # name, options...
  timeout 150 "$sanitizer" --tool "$1" --error-exitcode 9 --print-limit 50 "${@:2}" \
    "$build/run" --small >"$out/$1.txt" 2>&1
  echo "exit status $?" >>"$out/$1.txt"
}

# Whether a log says that all was well.
judge() {  # name, what its summary must say
  local clean='FAILED'
  if grep -qx 'exit status 0' "$out/$1.txt" && grep -qE "$2" "$out/$1.txt" &&
    [[ $(grep -c ' 0 failures' "$out/$1.txt") == 3 ]]; then
    clean='ok'
  else
    failed=1
  fi
  say "$1: $clean, $(tail -n 1 "$out/$1.txt")$(grep -oE ', [0-9]+ failures' "$out/$1.txt" |
    tr -d '\n'); $(grep -oE '(ERROR|RACECHECK) SUMMARY: .*' "$out/$1.txt" | tail -n 1)"
  [[ $clean == ok ]] || grep -m 5 -E 'Error|Invalid|FAILED' "$out/$1.txt" | tee -a "$out/summary.txt"
}

echo '== Building'
seconds=$SECONDS
jobs=()
for type in float half bfloat; do
  compile_shaders "$build/$type.o" "$type" & jobs+=($!)
done
"$nvcc" "${flags[@]}" -c "$here/run.cc" -o "$build/run.o" & jobs+=($!)
"$nvcc" "${flags[@]}" -c native/metal/plan.cc -o "$build/plan.o" & jobs+=($!)
for job in "${jobs[@]}"; do wait "$job" || failed=1; done
if ((failed)) || ! "$nvcc" "$build"/{float,half,bfloat,run,plan}.o -o "$build/run"; then
  say 'build: FAILED'
  exit 1
fi
say "build: ok, $((SECONDS - seconds)) s"

echo '== All shapes'
seconds=$SECONDS
timeout 120 "$build/run" >"$out/check.txt" 2>&1
status=$?
cat "$out/check.txt"
((status == 0)) || failed=1
say "check: exit status $status, $((SECONDS - seconds)) s"
grep -E ' failures, worst' "$out/check.txt" | tee -a "$out/summary.txt"

if sanitizer=$(find_tool compute-sanitizer); then
  echo '== compute-sanitizer'
  seconds=$SECONDS
  # Between the operands, so that a far overrun does not land in the next one.
  padding=()
  "$sanitizer" --help 2>&1 | grep -q -e '--padding' && padding=(--padding 4096)
  tool memcheck "${padding[@]}" &
  tool racecheck --racecheck-report all &
  tool synccheck &
  { timeout 90 "$sanitizer" --tool memcheck --print-limit 5 "$build/run" --small \
      --dtype float32 --short; echo "exit status $?"; } >"$out/memcheck_short.txt" 2>&1 &
  wait
  judge memcheck 'ERROR SUMMARY: 0 errors'
  judge racecheck 'RACECHECK SUMMARY: 0 hazards'
  judge synccheck 'ERROR SUMMARY: 0 errors'
  if grep -qE 'Invalid __global__ (read|write)' "$out/memcheck_short.txt"; then
    say "memcheck, operands two bytes short: noticed," \
      "$(grep -m 1 -oE 'Invalid __global__ .*' "$out/memcheck_short.txt")"
  else
    failed=1
    say 'memcheck, operands two bytes short: UNNOTICED'
  fi
  say "$((SECONDS - seconds)) s"

  echo '== Each barrier left out in turn'
  seconds=$SECONDS
  # So many at a time as there are cores, and not too many for one GPU.
  at_once=$(($(nproc) < 8 ? $(nproc) : 8))
  mapfile -t barriers < <("$python" "$here/generate.py" --list-barriers)
  for barrier in "${barriers[@]}"; do
    while (($(jobs -rp | wc -l) >= at_once)); do wait -n; done
    read -r barrier line <<<"$barrier"
    mutant "$barrier" "$line" >"$build/${barrier/:/_}.verdict" &
  done
  wait
  cat "$build"/*.verdict >"$out/mutants.txt"
  # Hazard by hazard, for whoever wonders at a verdict.
  for log in "$build"/*_[0-9]*.log; do
    echo "== $(basename "$log" .log)"
    grep -v '^=========$' "$log" | cut -c 1-200 | head -n 30
  done >>"$out/mutants.txt"
  noticed=$(cat "$build"/*.verdict | grep -c '^noticed')
  say "barriers left out: racecheck notices $noticed of ${#barriers[@]}, $((SECONDS - seconds)) s"
  cat "$build"/*.verdict | tee -a "$out/summary.txt"
  ((noticed == ${#barriers[@]} && noticed > 0)) || failed=1
else
  say 'compute-sanitizer: MISSING, so memory, races and barriers were not checked'
  failed=1
fi

echo '== Summary'
{
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>&1
  "$nvcc" --version | tail -n 1
  ((failed)) && echo 'metal_on_cuda: FAILED' || echo 'metal_on_cuda: all as it should be'
} >>"$out/summary.txt"
cat "$out/summary.txt"
exit "$failed"
