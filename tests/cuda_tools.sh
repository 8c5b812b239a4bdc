# For the scripts that check kernels on an NVIDIA GPU, which source this from the repository's root
# with the folder for logs as $1: `out` and `build` are folders, `nvcc` and `target` compile for the
# GPU of this machine, `say` adds a line to the summary, `find_tool` finds one of CUDA's programs.

mkdir -p "$1"
out=$(cd "$1" && pwd)
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
failed=0

say() { echo "$*" | tee -a "$out/summary.txt"; }
: >"$out/summary.txt"

# The path of one of CUDA's programs.
find_tool() {
  local path
  for path in "$(command -v "$1")" "${CUDA_HOME:-/usr/local/cuda}"/{bin,compute-sanitizer}/"$1" \
    /usr/local/cuda*/{bin,compute-sanitizer}/"$1"; do
    [[ -n $path && -x $path ]] && { echo "$path"; return; }
  done
  echo "no $1: not on PATH nor in CUDA_HOME or /usr/local/cuda" >&2
  return 1
}

nvcc=$(find_tool nvcc) || exit 2
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)
capability=${capability//[^0-9]/}
target=(-arch=native)
[[ -n $capability ]] && target=(-gencode "arch=compute_$capability,code=sm_$capability")
