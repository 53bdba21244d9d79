# `make` says what there is to make. What is missing is set up first: an environment in .venv with
# pinned packages and the C++ kernels (deploy/install.py; docs/install.md says what it downloads).

PYTHON ?= python3
MODEL ?= smollm2-135m
ARGS ?=
# CUDA=1: torch's CUDA build and Triton. An environment stays what it was made as.
CUDA ?= $(wildcard .venv/.serving-cuda .venv/.testing-cuda)
SHELL := /bin/bash
BIN := .venv/bin
KIND := $(if $(CUDA),-cuda)
SERVING := .venv/.serving$(KIND)
TESTING := .venv/.testing$(KIND)
INSTALL := $(BIN)/python deploy/install.py $(if $(CUDA),--cuda)
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h)

.PHONY: help serve test test-all test-gpu-interpreter lint format install bench bench-serve bench-steps \
	bench-tokens perplexity peers container-test install-test aarch64-test x86-test clients gpu-check gpu-bench fuzz soak clean
.DEFAULT_GOAL := help

help:
	@echo "make TARGET [ARGS='...']; first of all:"
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

serve: $(SERVING) ## serve MODEL (smollm2-135m) on 127.0.0.1:8000; CUDA=1: on an NVIDIA GPU
	$(BIN)/headstart serve $(MODEL) $(ARGS)

# Packages are installed without byte code, which Python then makes of what it imports. Tests start
# hundreds of processes: one that may not keep it (PYTHONDONTWRITEBYTECODE) compiles torch anew, for
# 3 to 5 seconds. It is kept apart from the sources.
unexport PYTHONDONTWRITEBYTECODE
test test-all: export PYTHONPYCACHEPREFIX = $(CURDIR)/.venv/pycache

test: $(TESTING) ## run the tests, 10 to 16 minutes on two cores
	$(BIN)/pytest -n 2 --no-loadscope-reorder --session-timeout=4500 -m 'not slow and not interpreter' $(ARGS)

test-all: $(TESTING) ## run every test, with as many random examples as they ask for: up to an hour on two cores
	$(BIN)/pytest -n 2 --no-loadscope-reorder --hypothesis-profile=all $(ARGS)

test-gpu-interpreter: $(TESTING) ## run the GPU kernels' tests in Triton's interpreter
	$(BIN)/pytest --hypothesis-profile=all -m 'interpreter or smoke' $(ARGS)

lint: $(TESTING) ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(TESTING) ## put the style in order
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

install: $(SERVING) ## set up what serving needs, and no more

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "headstart needs Python 3.11 or later: make PYTHON=...")'
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }  # half an environment would count as one

$(SERVING): $(SOURCES) | $(BIN)/python
	$(INSTALL)
	touch $@

$(TESTING): $(SOURCES) | $(BIN)/python
	$(INSTALL) --extras test
	touch $(SERVING) $@

.venv/.bench$(KIND): $(SOURCES) | $(BIN)/python
	$(INSTALL) --extras bench
	touch $(SERVING) $@

# --- measurements: see bench/README.md ---

bench: .venv/.bench$(KIND) peers ## measure beside other engines
	$(BIN)/python -m headstart.bench.peers $(ARGS)

bench-serve: .venv/.bench$(KIND) ## load a server at URL
	$(BIN)/python -m headstart.bench.serve --url $(or $(URL),http://127.0.0.1:8000) $(ARGS)

bench-steps: .venv/.bench$(KIND) ## time single steps
	$(BIN)/python -m headstart.bench.steps $(ARGS)

bench-tokens: .venv/.bench$(KIND) peers ## compare tokens with llama.cpp's
	$(BIN)/python -m headstart.bench.tokens $(ARGS)

perplexity: .venv/.bench$(KIND) ## compare weight formats
	$(BIN)/python -m headstart.bench.perplexity $(MODEL)

peers: .venv-peers/.installed

# llama.cpp is compiled: some 12 minutes on two cores.
.venv-peers/.installed:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install openvino-genai==2026.4.1.0 llama-cpp-python==0.3.36
	touch $@

# --- long checks, not part of "make test" ---

# On a machine with a GPU, in an environment with torch's CUDA build and headstart[cuda,test], such
# as `make CUDA=1 test` makes: every parity test on the device, bfloat16 included.
gpu-check: ## on a GPU, in the environment at hand: the parity tests
	pytest tests/kernels/gpu tests/engine/test_gpu.py tests/engine/models/test_decode_graphs.py $(ARGS)

# The authors' relay table, prefill TFLOP/s, decode GB/s, into bench/results with the card's name;
# end to end beside vLLM, where the interpreter VLLM_PYTHON has it.
VLLM_PYTHON ?= $(shell command -v python)
gpu-bench: ## on a GPU, in the environment at hand: all its figures
	python -m headstart.bench.gpu
	python -m headstart.bench.gpu --flash
	@if $(VLLM_PYTHON) -c "import vllm" 2>/dev/null; then \
		python -m headstart.bench.peers --beside vllm --python $(VLLM_PYTHON) --model $(MODEL) \
			--out bench/results/gpu-vllm.jsonl $(ARGS); \
	else echo "vLLM is not installed for VLLM_PYTHON=$(VLLM_PYTHON): not compared with it"; fi

container-test: ## as root: build the image, run it, ask it
	deploy/container_test.sh

install-test: ## as root: the README's commands in a bare Debian
	deploy/install_test.sh

aarch64-test: ## cross-build the kernels, run their tests under qemu
	deploy/aarch64_test.sh

x86-test: $(TESTING) ## every x86 instruction set's kernels on a CPU with AVX2, emulated
	deploy/x86_test.sh $(ARGS)

# Some 20,000 requests made of /openapi.json, at a server with adapters that may be loaded.
FUZZ_PORT ?= 8765
FUZZ_CASES ?= 300
FUZZ_SEEDS ?= 1 2 3
fuzz: $(TESTING) ## requests made of /openapi.json
	$(BIN)/headstart serve $(MODEL) --port $(FUZZ_PORT) --kv-memory 1GiB --lora-dir tests & server=$$!; \
	trap "kill $$server" EXIT; \
	until curl -sf http://127.0.0.1:$(FUZZ_PORT)/ready > /dev/null; do kill -0 $$server || exit 1; sleep 1; done; \
	for seed in $(FUZZ_SEEDS); do \
	  $(BIN)/schemathesis --config-file tests/server/schemathesis.toml \
	  run http://127.0.0.1:$(FUZZ_PORT)/openapi.json --checks all \
	  --phases coverage,fuzzing --max-examples $(FUZZ_CASES) --seed $$seed --generation-database none \
	  --continue-on-failure $(ARGS) || exit 1; \
	done

# Node.js and npm have to be there; PyPI and npm are asked the first time.
clients: $(TESTING) ## Claude Code, Codex and other programs at a server
	$(BIN)/python tests/clients/run_clients.py $(ARGS)

soak: .venv/.bench$(KIND) ## load a server for a long time
	$(BIN)/python -m headstart.bench.soak $(ARGS)

clean: ## remove the environments and what was compiled
	rm -rf build .venv .venv-peers
