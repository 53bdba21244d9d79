# make serve   the default model on 127.0.0.1:8000       make test   every test
#
# Both set up what is missing: a virtual environment in .venv, pinned packages, the C++ kernels.
# Where pip does not find a CPU build of torch by itself, name PyTorch's CPU wheel index:
#   make serve TORCH_INDEX=<address>

PYTHON ?= python3
MODEL ?= smollm2-135m
TORCH_INDEX ?=
ARGS ?=
SHELL := /bin/bash
BIN := .venv/bin
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h)

.PHONY: serve test lint format install bench bench-serve bench-steps bench-tokens perplexity peers container-test gpu-check gpu-bench fuzz soak clean
.DEFAULT_GOAL := test

serve: install
	$(BIN)/headstart serve $(MODEL) $(ARGS)

test: install
	$(BIN)/pytest $(ARGS)

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

install: .venv/.installed

# torch comes first and by its CPU build's name: a plain request may bring gigabytes of CUDA.
.venv/.torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "headstart needs Python 3.11 or later: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) '$(TORCH)+cpu' || \
	  { echo "error: pip found no $(TORCH)+cpu; pass the address of PyTorch's CPU wheel index as TORCH_INDEX=..." >&2; exit 1; }
	touch $@

.venv/.installed: .venv/.torch $(SOURCES)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

# --- measurements: see bench/README.md ---

bench: install peers
	$(BIN)/python -m headstart.bench.peers $(ARGS)

bench-serve: install
	$(BIN)/python -m headstart.bench.serve --url $(or $(URL),http://127.0.0.1:8000) $(ARGS)

bench-steps: install
	$(BIN)/python -m headstart.bench.steps $(ARGS)

bench-tokens: install peers
	$(BIN)/python -m headstart.bench.tokens $(ARGS)

perplexity: install
	$(BIN)/python -m headstart.bench.perplexity $(MODEL)

peers: .venv-peers/.installed

# llama.cpp is compiled: some 12 minutes on two cores.
.venv-peers/.installed:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install -q openvino-genai==2026.4.1.0 llama-cpp-python==0.3.36
	touch $@

# --- long checks, not part of "make test" ---

# On a machine with a GPU, in an environment with CUDA builds of torch and headstart[cuda,dev]:
# every parity test on the device, bfloat16 included.
gpu-check:
	pytest tests/kernels/gpu tests/engine/test_gpu.py tests/engine/test_decode_graphs.py $(ARGS)

# The authors' relay table, prefill TFLOP/s, decode GB/s, into bench/results with the card's name;
# end to end beside vLLM, where the interpreter VLLM_PYTHON has it.
VLLM_PYTHON ?= $(shell command -v python)
gpu-bench:
	python -m headstart.bench.gpu
	python -m headstart.bench.gpu --flash
	@if $(VLLM_PYTHON) -c "import vllm" 2>/dev/null; then \
		python -m headstart.bench.peers --beside vllm --python $(VLLM_PYTHON) --model $(MODEL) \
			--out bench/results/gpu-vllm.jsonl $(ARGS); \
	else echo "vLLM is not installed for VLLM_PYTHON=$(VLLM_PYTHON): not compared with it"; fi

container-test:
	deploy/container_test.sh

# Some 20,000 requests made of /openapi.json, at a server with adapters that may be loaded.
FUZZ_PORT ?= 8765
FUZZ_CASES ?= 300
FUZZ_SEEDS ?= 1 2 3
fuzz: install
	$(BIN)/headstart serve $(MODEL) --port $(FUZZ_PORT) --kv-memory 1GiB --lora-dir tests & server=$$!; \
	trap "kill $$server" EXIT; \
	until curl -sf http://127.0.0.1:$(FUZZ_PORT)/ready > /dev/null; do kill -0 $$server || exit 1; sleep 1; done; \
	for seed in $(FUZZ_SEEDS); do \
	  $(BIN)/schemathesis --config-file tests/server/schemathesis.toml \
	  run http://127.0.0.1:$(FUZZ_PORT)/openapi.json --checks all \
	  --phases coverage,fuzzing --max-examples $(FUZZ_CASES) --seed $$seed --generation-database none \
	  --continue-on-failure $(ARGS) || exit 1; \
	done

soak: install
	$(BIN)/python -m headstart.bench.soak $(ARGS)

clean:
	rm -rf build .venv .venv-peers
