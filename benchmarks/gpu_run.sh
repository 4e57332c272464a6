#!/usr/bin/env bash
# Everything that needs a GPU, in one command and nine minutes:
#
#     benchmarks/gpu_run.sh [FOLDER]      # logs and JSON go there; default $OUT, else benchmarks/out/gpu
#
# In this order: build for the GPU at hand, the tests marked gpu, once more with Hopper's own kernels,
# compute-sanitizer over a short list, limits and rivals, Hopper's kernels, the report. Each step is
# bounded in time, and all of them by the run's; a failing one is reported at the end, in summary.txt
# and by the exit status, and does not stop the rest.
#
#   PYTHON=python3      the interpreter
#   MINUTES=9           stretches or shortens all limits alike
#   FAISS_GPU=.gpu      a folder with FAISS for GPUs: faiss-gpu.tar.xz, or that unpacked. It holds
#                       activate.sh, which is sourced for the benchmarks and sets PYTHONPATH
#   DATASTORE=FOLDER    real keys; otherwise some are made, if transformers is installed
#   NULL_EPILOGUE=1     also build without the scan's epilogue and compare kernel times (3 minutes more)
set -u
cd "$(dirname "$0")/.." || exit 2
root=$PWD
out=${1:-${OUT:-benchmarks/out/gpu}}
python=${PYTHON:-python3}
minutes=${MINUTES:-9}
faiss=${FAISS_GPU:-.gpu}
mkdir -p "$out"
out=$(cd "$out" && pwd)
: >"$out/summary.txt"
failures=0
deadline=$((SECONDS + minutes * 60))
export PYTHONUNBUFFERED=1 KNNEXT_REQUIRE_GPU=1
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

say() { printf '%s\n' "$*" | tee -a "$out/summary.txt"; }

# step NAME SECONDS RESERVED COMMAND...: at most SECONDS of a nine-minute run, and so that RESERVED
# seconds stay for the steps behind it. SIGINT lets pytest write what it has measured.
step() {
  local name=$1 limit=$(($2 * minutes / 9)) left=$((deadline - SECONDS - $3 * minutes / 9))
  local start=$SECONDS status=0 verdict=ok
  shift 3
  if [ "$left" -lt 5 ]; then
    say "$(printf '%-14s %-20s' "$name" "NO TIME LEFT")"
    failures=$((failures + 1))
    return
  fi
  [ "$limit" -gt "$left" ] && limit=$left
  [ "$limit" -lt 1 ] && limit=1
  timeout --signal=INT --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  if [ "$status" -ne 0 ]; then
    verdict="FAILED ($status)"
    [ $((SECONDS - start)) -ge "$limit" ] && verdict="OUT OF TIME (${limit}s)"
    failures=$((failures + 1))
  fi
  say "$(printf '%-14s %-20s %4ds  %s' "$name" "$verdict" $((SECONDS - start)) \
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

gpu_tests() {
  "$python" -m pytest -q -m gpu -p no:cacheprovider --timeout=120 --junitxml="$out/$1.xml" "${@:2}"
}

sanitize() {
  # PyTorch's caching allocator hides reads past a tensor's end from memcheck.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 1 \
    --target-processes application-only --kernel-name-exclude 'kernel_substring=at::' \
    "$python" -m pytest -q -x -p no:cacheprovider --timeout=600 tests/gpu/test_gpu_search.py \
    -k "test_forced_failures_change_nothing or test_strided_and_unaligned_rows or test_empty_and_short"
}

# Its libraries serve the benchmarks only: tests run beside what is installed.
activate_faiss() {
  [ -f "$faiss_site/activate.sh" ] || return 0
  set +u
  . "$faiss_site/activate.sh"
  "$python" -c 'import torch, faiss; print("faiss", faiss.__version__, "on", faiss.get_num_gpus(), "GPUs")'
}

benchmarks() {
  local name=$1
  shift
  activate_faiss
  "$python" -m pytest -q benchmarks -k cuda -p no:cacheprovider --benchmark-json="$out/$name.json" \
    ${DATASTORE:+--datastore="$DATASTORE"} "$@"
}

report() {
  local files=()
  for name in bench bench_sm90; do [ -s "$out/$name.json" ] && files+=("$out/$name.json"); done
  [ ${#files[@]} -gt 0 ] || { echo "error: no benchmark left its JSON"; return 1; }
  "$python" benchmarks/report.py "${files[@]}" --page "$out/README.md" --pictures "$out/pictures"
}

kernel_times() {  # FOLDER NAME: of the package in that folder
  PYTHONPATH=$1 "$python" "$root/benchmarks/kernel_times.py" --json "$out/$2.json"
}

null_epilogue() {
  local copy
  copy=$(mktemp -d) || return
  cp -r csrc knnext setup.py pyproject.toml README.md LICENSE "$copy" && rm -rf "$copy"/knnext/lib
  (cd "$copy" && NVCC_APPEND_FLAGS=-DKNNEXT_NULL_EPILOGUE KNNEXT_CUDA=1 NVCC_THREADS=2 \
    "$python" setup.py build_ext --inplace) && kernel_times "$copy" kernels_null
  local status=$?
  rm -rf "$copy"
  return $status
}
export -f machine gpu_tests sanitize activate_faiss benchmarks report kernel_times null_epilogue
export python out root

faiss_site=$faiss
if [ -f "$faiss/faiss-gpu.tar.xz" ]; then
  faiss_site=$(mktemp -d)
  trap 'rm -rf "$faiss_site"' EXIT
  tar xf "$faiss/faiss-gpu.tar.xz" -C "$faiss_site"
fi
faiss_site=$(cd "$faiss_site" 2>/dev/null && pwd)
export faiss_site

say "knnext on $(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1), $(date -u +%FT%TZ), $(git rev-parse --short HEAD 2>/dev/null)"
[ -f "$faiss_site/activate.sh" ] || say "no FAISS for GPUs in ${faiss}: what is installed counts"
step machine 20 0 bash -c machine
step build 140 0 env KNNEXT_CUDA=1 NVCC_THREADS=2 "$python" setup.py build_ext --inplace
export KNNEXT_FUZZ_SECONDS=$((20 * minutes / 9))
step tests 140 210 bash -c 'gpu_tests tests tests'
step tests_sm90 60 210 env KNNEXT_SM90=all bash -c \
  'gpu_tests tests_sm90 tests -k "search or sm90"'
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck; do step "$tool" 25 190 bash -c "sanitize $tool"; done
  step memcheck_sm90 25 190 env KNNEXT_SM90=all bash -c "sanitize memcheck"
else
  say "compute-sanitizer is not installed: its steps were left out"
fi
if [ -z "${DATASTORE:-}" ] && "$python" -c 'import transformers' 2>/dev/null; then
  step real_keys 30 180 "$python" benchmarks/real_keys.py --steps 1500
fi
step bench 200 65 bash -c "benchmarks bench --budget=$((100 * minutes / 9))"
step bench_sm90 60 15 env KNNEXT_SM90=1 bash -c \
  'benchmarks bench_sm90 --only=bare_product,knnext,knnext_sqnorms -k "cuda and knn_search"'
step report 30 0 bash -c report
if [ "${NULL_EPILOGUE:-0}" = 1 ]; then
  deadline=$((SECONDS + 240))
  export KNNEXT_SM90=1
  step kernels 60 0 bash -c 'kernel_times "$root" kernels'
  step kernels_null 240 0 bash -c null_epilogue
fi
say "$failures step(s) failed; everything is in $out"
exit $((failures > 0))
