#!/usr/bin/env bash
# Everything that needs a GPU, in one command and nine minutes:
#
#     benchmarks/gpu_run.sh [FOLDER]      # logs and JSON go there; default $OUT, else benchmarks/out/gpu
#
# Builds for the GPU at hand, runs the tests marked gpu, compute-sanitizer over a short list where it
# is installed, and the benchmarks. Each step is bounded in time; a failing one is reported at the
# end, in summary.txt and by the exit status, and does not stop the rest. Set PYTHON to choose the
# interpreter; MINUTES (default 9) stretches or shortens all limits alike.
set -u
cd "$(dirname "$0")/.." || exit 2
out=${1:-${OUT:-benchmarks/out/gpu}}
python=${PYTHON:-python3}
minutes=${MINUTES:-9}
mkdir -p "$out"
out=$(cd "$out" && pwd)
: >"$out/summary.txt"
failures=0
export PYTHONUNBUFFERED=1 KNNEXT_REQUIRE_GPU=1

say() { printf '%s\n' "$*" | tee -a "$out/summary.txt"; }

# step NAME SECONDS COMMAND...: seconds are of a nine-minute run.
step() {
  local name=$1 limit=$(($2 * minutes / 9)) start=$SECONDS status=0
  shift 2
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  local verdict=ok
  if [ "$status" -ne 0 ]; then
    verdict="FAILED ($status)"
    [ "$status" -ge 124 ] && verdict="OUT OF TIME (${limit}s)"
    failures=$((failures + 1))
  fi
  say "$(printf '%-12s %-20s %4ds  %s' "$name" "$verdict" $((SECONDS - start)) \
    "$(grep -aE '(passed|failed|error|skipped|ERROR SUMMARY)' "$out/$name.log" | tail -n 1 | cut -c1-120)")"
}

machine() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv
  nvcc --version | tail -n 2
  "$python" - <<'PYTHON'
import sys
import torch
missing = []
for name in ("pytest", "pytest_timeout", "hypothesis", "pybind11", "ninja", "pytest_benchmark"):
    try:
        __import__(name)
    except ImportError:
        missing.append(name)
print("python", sys.version.split()[0], "torch", torch.__version__, "cuda", torch.version.cuda)
if missing:
    sys.exit("missing Python packages: " + ", ".join(missing))
assert torch.cuda.is_available(), "torch sees no CUDA device"
PYTHON
}

# Only for the GPU at hand: the whole list takes several times as long.
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)
[ "$capability" = 9.0 ] && capability=9.0a
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-${capability:-8.0}}

sanitize() {
  local tool=$1
  # PyTorch's caching allocator hides reads past a tensor's end from memcheck.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
    --target-processes application-only --kernel-name-exclude 'kernel_substring=at::' \
    "$python" -m pytest -q -x -p no:cacheprovider --timeout=600 tests/gpu/test_gpu_search.py \
    -k "test_forced_failures_change_nothing or test_strided_and_unaligned_rows or test_empty_and_short"
}
export -f sanitize machine
export python

say "knnext on $(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1), $(date -u +%FT%TZ), $(git rev-parse --short HEAD 2>/dev/null)"
step machine 20 bash -c machine
step build 130 env KNNEXT_CUDA=1 NVCC_THREADS=2 "$python" setup.py build_ext --inplace
step tests 170 env KNNEXT_FUZZ_SECONDS=$((40 * minutes / 9)) "$python" -m pytest -q -m gpu \
  -p no:cacheprovider --timeout=120 --junitxml="$out/tests.xml" tests
step bench 110 "$python" -m pytest -q benchmarks -k cuda --benchmark-json="$out/bench.json"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck; do step "$tool" 35 bash -c "sanitize $tool"; done
else
  say "compute-sanitizer is not installed: its steps were left out"
fi
say "$failures step(s) failed; everything is in $out"
exit $((failures > 0))
