#!/usr/bin/env bash
# Usage: tests/cuda_check.sh OUT     (Linux, an NVIDIA GPU of compute capability 8.0, CUDA's nvcc)
#
# The portable CUDA kernels of native/cuda/kernels.h, built for this machine's GPU: every result
# checked against float64 on all shapes; memcheck and racecheck on small ones; then times. Logs, and
# a summary, go to the folder OUT. JOBS (as many as there are cores) compilations at a time.
set -uo pipefail

cd "$(dirname "$0")/.."
[[ $# -eq 1 ]] || { sed -n 2p "$0" >&2; exit 2; }
source tests/cuda_tools.sh "$1"
flags=(-std=c++17 -O3 -lineinfo -Xcompiler -Wall -I .)

echo '== Building'
seconds=$SECONDS
jobs=()
sources=(gpu.cc {delta_fma,delta_mma,delta_tma,thin,rows,decode,grad,grad_tma,tma,kernels_test}.cu)
objects=()
for source in "${sources[@]}"; do
  name=${source%.*}
  objects+=("$build/$name.o")
  while (($(jobs -rp | wc -l) >= ${JOBS:-$(nproc)})); do wait -n; done
  "$nvcc" "${flags[@]}" "${target[@]}" --resource-usage -c "native/cuda/$source" \
    -o "$build/$name.o" >"$out/build_$name.txt" 2>&1 &
  jobs+=($!)
done
for job in "${jobs[@]}"; do wait "$job" || failed=1; done
if ((failed)) || ! "$nvcc" "${target[@]}" "${objects[@]}" -o "$build/kernels_test"; then
  grep -hE 'error' "$out"/build_*.txt | head -n 20 | tee -a "$out/summary.txt"
  say 'build: FAILED'
  exit 1
fi
say "build: ok, $((SECONDS - seconds)) s," \
  "$(cat "$out"/build_*.txt | grep -c 'spill' || true) kernels," \
  "$(cat "$out"/build_*.txt | grep 'spill' | grep -vc ' 0 bytes spill stores' || true) that spill"

echo '== All shapes'
seconds=$SECONDS
timeout 100 "$build/kernels_test" --no-times >"$out/check.txt" 2>&1
status=$?
cat "$out/check.txt"
((status == 0)) || failed=1
say "check: exit status $status, $((SECONDS - seconds)) s"
grep -E ' failures, worst' "$out/check.txt" | tee -a "$out/summary.txt"
((status == 0)) || grep -m 12 -vE ' failures, worst' "$out/check.txt" | tee -a "$out/summary.txt"

# One of compute-sanitizer's tools on the small shapes of each dtype, side by side: racecheck takes
# minutes for one.
dtypes=(float32 bfloat16 float16)
tool() {  # name, options...
  for dtype in "${dtypes[@]}"; do
    {
      timeout 300 "$sanitizer" --tool "$1" --error-exitcode 9 --print-limit 50 "${@:2}" \
        "$build/kernels_test" --small --dtype "$dtype"
      echo "exit status $?"
    } >"$out/$1_$dtype.txt" 2>&1 &
  done
}

# Whether its logs say that all was well.
judge() {  # name, what a summary must say
  local dtype log
  for dtype in "${dtypes[@]}"; do
    log=$out/$1_$dtype.txt
    if grep -qx 'exit status 0' "$log" && grep -qE "$2" "$log" && grep -q ' 0 failures' "$log"; then
      say "$1 $dtype: ok"
    else
      failed=1
      say "$1 $dtype: FAILED, $(tail -n 1 "$log")" \
        "$(grep -oE '(ERROR|RACECHECK) SUMMARY: .*' "$log" | tail -n 1)"
      grep -m 8 -E 'Error|Invalid|hazard|FAILED| at .*\.cuh?:' "$log" | tee -a "$out/summary.txt"
    fi
  done
}

if sanitizer=$(find_tool compute-sanitizer); then
  echo '== compute-sanitizer'
  seconds=$SECONDS
  # Between the operands, so that a far overrun does not land in the next one.
  padding=()
  "$sanitizer" --help 2>&1 | grep -q -e '--padding' && padding=(--padding 4096)
  tool memcheck "${padding[@]}"
  tool racecheck --racecheck-report all
  wait
  judge memcheck 'ERROR SUMMARY: 0 errors'
  judge racecheck 'RACECHECK SUMMARY: 0 hazards'
  say "$((SECONDS - seconds)) s"
else
  say 'compute-sanitizer: MISSING, so memory and races were not checked'
  failed=1
fi

echo '== Times'
timeout 60 "$build/kernels_test" --times >"$out/times.txt" 2>&1 || {
  failed=1
  say "times: FAILED, $(tail -n 1 "$out/times.txt")"
}

echo '== Summary'
{
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>&1
  "$nvcc" --version | tail -n 1
  ((failed)) && echo 'cuda_check: FAILED' || echo 'cuda_check: all as it should be'
  cat "$out/times.txt"
} >>"$out/summary.txt"
cat "$out/summary.txt"
exit "$failed"
