#!/usr/bin/env bash
# Everything that needs a GPU, in one command and nine minutes:
#
#     benchmarks/gpu_run.sh [FOLDER]      # logs and JSON go there; default $OUT, else benchmarks/out/gpu
#
# In this order: build for the GPU at hand; every op once (`knnext doctor --check`); then side by side, since none of them looks at the clock,
# the tests marked gpu, the same once more with Hopper's own kernels, compute-sanitizer over a short
# list, and real keys made; then limits and rivals, Hopper's kernels, the report. Each step is bounded
# in time, and all of them by the run's; a failing one is reported at the end, in summary.txt and by
# the exit status, and does not stop the rest.
#
#   PYTHON=python3      the interpreter
#   MINUTES=9           stretches or shortens all limits alike
#   STEPS="a b"         these steps alone, each with all the time that is left. In their order:
#                       machine build check tests tests_sm90 memcheck racecheck initcheck memcheck_sm90
#                       real_keys bench bench_sm90 report, and two that else are left out:
#                       kernels kernels_null (NULL_EPILOGUE=1) and profile (Nsight Compute)
#   ARCHIVE=1           leave few files: summary.txt, the JSON, README.md, and everything again in
#                       results.tar.gz, which is renewed after every step
#   RIVALS=.gpu         a folder with what the benchmarks compare with and the machine lacks (FAISS for
#                       GPUs, cuVS): *.tar.xz that unpack into one folder, or that folder. It holds
#                       activate.sh, which is sourced for the benchmarks and sets PYTHONPATH
#   DATASTORE=FOLDER    real keys; otherwise some are made, if transformers is installed
#   NULL_EPILOGUE=1     also build without the scan's epilogue and compare kernel times (3 minutes more)
set -u
cd "$(dirname "$0")/.." || exit 2
root=$PWD
final=${1:-${OUT:-benchmarks/out/gpu}}
python=${PYTHON:-python3}
[[ $python = */* && $python != /* ]] && python=$root/$python
minutes=${MINUTES:-9}
steps=${STEPS:-}
rivals=${RIVALS:-.gpu}
mkdir -p "$final"
final=$(cd "$final" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
out=$final
[ "${ARCHIVE:-0}" = 1 ] && out=$scratch/out && mkdir "$out"
: >"$out/summary.txt"
now() { date +%s; }
deadline=$(($(now) + minutes * 60))
export PYTHONUNBUFFERED=1 KNNEXT_REQUIRE_GPU=1
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

for name in $steps; do
  case " machine build check tests tests_sm90 memcheck racecheck initcheck memcheck_sm90 real_keys bench \
bench_sm90 report kernels kernels_null profile " in *" $name "*) ;; *)
    echo "gpu_run.sh: STEPS names $name, which is none of its steps" >&2
    exit 2
    ;;
  esac
done

say() { printf '%s\n' "$*" | tee -a "$out/summary.txt"; }

wanted() { [ -z "$steps" ] || [[ " $steps " = *" $1 "* ]]; }
asked() { [[ " $steps " = *" $1 "* ]]; }

# Puts what there is where it outlives this script, however that ends.
publish() {
  [ "$out" = "$final" ] && return
  (
    flock 9
    tar czf "$scratch/results.tar.gz" -C "$out" . 2>/dev/null
    cp "$scratch/results.tar.gz" "$out/summary.txt" "$final"
    for file in "$out"/*.json "$out/README.md"; do [ -f "$file" ] && cp "$file" "$final"; done
  ) 9>"$scratch/lock"
}

# step NAME SECONDS RESERVED COMMAND...: at most SECONDS of a nine-minute run, and so that RESERVED
# seconds stay for the steps behind it. SIGINT lets pytest write what it has measured.
step() {
  local start name=$1 limit=$(($2 * minutes / 9)) left status=0 verdict=ok
  start=$(now)
  left=$((deadline - start - $3 * minutes / 9))
  shift 3
  wanted "$name" || return
  [ -n "$steps" ] && left=$((deadline - start)) && limit=$left
  if [ "$left" -lt 5 ]; then
    say "$(printf '%-14s %-20s' "$name" "NO TIME LEFT")"
    return
  fi
  [ "$limit" -gt "$left" ] && limit=$left
  [ "$limit" -lt 1 ] && limit=1
  # Bash lets what runs in its background ignore SIGINT.
  timeout --signal=INT --kill-after=10 "$limit" env --default-signal=INT "$@" \
    >"$out/$name.log" 2>&1 || status=$?
  local took=$(($(now) - start))
  [ "$status" -ne 0 ] && verdict="FAILED ($status)"
  # 124 is timeout's word for it; 137 is its SIGKILL, or that of a machine short of memory.
  [ "$status" -eq 124 ] || { [ "$status" -eq 137 ] && [ "$took" -ge "$limit" ]; } &&
    verdict="OUT OF TIME (${limit}s)"
  say "$(printf '%-14s %-20s %4ds  %s' "$name" "$verdict" "$took" \
    "$(grep -aE '(passed|failed|error|skipped|ERROR SUMMARY)' "$out/$name.log" | tail -n 1 | cut -c1-120)")"
  publish
}

# Beside others where there are processors for that.
processors=$(nproc)
beside() { if [ "$processors" -ge 8 ]; then step "$@" & else step "$@"; fi; }

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
  local workers=() each=$((processors / 3))
  export KNNEXT_FUZZ_SECONDS=$((20 * minutes / 9))
  if [ "$each" -ge 2 ] && "$python" -c 'import xdist' 2>/dev/null; then
    workers=(-n "$each" --dist worksteal)
    KNNEXT_FUZZ_SECONDS=$((120 * minutes / 9))  # in parts that the workers share
  fi
  "$python" -m pytest -q -m gpu -p no:cacheprovider --timeout=120 --junitxml="$out/$1.xml" \
    "${workers[@]}" tests/gpu "${@:2}"
}

sanitize() {
  # Filters see mangled names. What other kernels write must count as written, so initcheck sees all.
  local only=(--kernel-name kernel_substring=6knnext)
  [ "$1" = initcheck ] && only=()
  # PyTorch's caching allocator hides reads past a tensor's end from memcheck.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 1 \
    --target-processes application-only "${only[@]}" \
    "$python" -m pytest -q -x -p no:cacheprovider --timeout=600 tests/gpu/test_short_list.py
}

# Its libraries serve the benchmarks only: tests run beside what is installed.
activate_rivals() {
  [ -f "$site/activate.sh" ] || return 0
  set +u
  . "$site/activate.sh"
  "$python" -c 'import torch, faiss; print("faiss", faiss.__version__, "on", faiss.get_num_gpus(), "GPUs")'
}

benchmarks() {
  local name=$1
  shift
  activate_rivals
  "$python" -m pytest -q benchmarks -k cuda -p no:cacheprovider --benchmark-json="$out/$name.json" \
    ${DATASTORE:+--datastore="$DATASTORE"} "$@"
}

report() {
  local files=()
  for name in bench bench_sm90; do
    [ -s "$out/$name.json" ] || cp "$final/$name.json" "$out" 2>/dev/null  # of an earlier call
    [ -s "$out/$name.json" ] && files+=("$out/$name.json")
  done
  [ ${#files[@]} -gt 0 ] || { echo "error: no benchmark left its JSON"; return 1; }
  "$python" -m benchmarks.report "${files[@]}" --page "$out/README.md" --pictures "$out/pictures"
}

kernel_times() {  # FOLDER NAME: of the package in that folder, found before this one's
  (cd "$1" && PYTHONPATH=$1:$root "$python" -m benchmarks.timing.kernels --json "$out/$2.json")
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

# Why the scans take as long as they do: which unit is busy, what warps wait for.
profile() {
  for shape in "--queries 4096 --entries 1000000" "--queries 64 --entries 4000000"; do
    # shellcheck disable=SC2086
    ncu --clock-control none --target-processes application-only \
      --kernel-name 'regex:scan_kernel|sm90_' --launch-count 4 --section LaunchStats \
      --section Occupancy --section SpeedOfLight --section ComputeWorkloadAnalysis \
      --section MemoryWorkloadAnalysis --section MemoryWorkloadAnalysis_Tables \
      --section SchedulerStats --section WarpStateStats \
      "$python" -m benchmarks.timing.kernels $shape --calls 1 --run-only || return
  done
}
export -f machine gpu_tests sanitize activate_rivals benchmarks report kernel_times null_epilogue profile
export PYTHON=$python python out final root processors minutes

site=$rivals
if ls "$rivals"/*.tar.xz >/dev/null 2>&1 && { wanted bench || wanted bench_sm90; }; then
  site=$scratch/rivals
  mkdir "$site"
  # Not every machine has xz; Python has one of its own.
  for archive in "$rivals"/*.tar.xz; do
    tar xf "$archive" -C "$site" 2>/dev/null || "$python" -m tarfile -e "$archive" "$site"
  done
fi
site=$(cd "$site" 2>/dev/null && pwd)
export site

say "knnext on $(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1), $(date -u +%FT%TZ), $(git rev-parse --short HEAD 2>/dev/null)"
{ wanted bench || wanted bench_sm90; } && [ ! -f "$site/activate.sh" ] &&
  say "no rivals in ${rivals}: what is installed counts"
step machine 20 0 bash -c machine
step build 150 0 env KNNEXT_CUDA=1 NVCC_THREADS=2 "$python" setup.py build_ext --inplace
step check 40 0 "$python" -m knnext doctor --check

beside tests 150 230 bash -c 'gpu_tests tests'
beside tests_sm90 150 230 env KNNEXT_SM90=all bash -c 'gpu_tests tests_sm90 -k "search or sm90"'
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck; do beside $tool 150 230 bash -c "sanitize $tool"; done
  beside memcheck_sm90 150 230 env KNNEXT_SM90=all bash -c "sanitize memcheck"
else
  say "compute-sanitizer is not installed: its steps were left out"
fi
if [ -z "${DATASTORE:-}" ] && "$python" -c 'import transformers' 2>/dev/null; then
  beside real_keys 120 230 "$python" -m benchmarks.data.real_keys --steps 1500
fi
wait

# The first exchanges between GPUs: shards of one datastore, the answers of one process.
if [ "$(nvidia-smi --list-gpus 2>/dev/null | wc -l)" -ge 2 ]; then
  mkdir -p "$scratch/nccl"
  step nccl 120 0 "$python" -m torch.distributed.run --standalone --nproc-per-node 2 \
    -m tests.index.sharded_program "$scratch/nccl" 16 cuda
fi

budget=$((130 * minutes / 9))
[ -n "$steps" ] && budget=$(((deadline - $(now)) * 6 / 10))
step bench 200 65 bash -c "benchmarks bench --budget=$budget"
step bench_sm90 60 15 env KNNEXT_SM90=1 bash -c \
  'benchmarks bench_sm90 --only=bare_product,knnext,knnext_sqnorms -k "cuda and knn_search"'
step report 30 0 bash -c report
if [ "${NULL_EPILOGUE:-0}" = 1 ] || asked kernels || asked kernels_null; then
  [ -z "$steps" ] && deadline=$(($(now) + 240))
  export KNNEXT_SM90=1
  step kernels 60 0 bash -c 'kernel_times "$root" kernels'
  step kernels_null 240 0 bash -c null_epilogue
fi
asked profile && step profile 240 0 bash -c profile

failures=$(grep -cE '^[a-z0-9_]+ +(FAILED|OUT OF TIME|NO TIME LEFT)' "$out/summary.txt")
say "$failures step(s) failed; everything is in $final"
publish
exit $((failures > 0))
