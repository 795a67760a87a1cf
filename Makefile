# Two commands set everything up: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo up test test-gpu test-vllm-next soak docs screenshots check lint types layers format clean help

help: ## what there is
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 14

demo: ## install, run the main job on real input, write demo/report.html
	$(PYTHON) tools/install.py --for demo
	$(BIN)/millpond demo

up: ## install, then start the whole demo: notebooks, gateway and vault; needs root
	$(PYTHON) tools/install.py --for up
	$(BIN)/millpond up --demo

test: ## install, then run every test
	$(PYTHON) tools/install.py --for test
	$(BIN)/python -m pytest

test-gpu: ## install, then the tests that need a CUDA GPU
	$(PYTHON) tools/install.py --for test
	$(BIN)/python -m pytest -m gpu

test-vllm-next: ## install, fetch vLLM 0.33's code, then run capture's tests on it
	$(PYTHON) tools/install.py --for test
	$(BIN)/python tools/vllm_next.py

soak: ## install, then an hour or two of random traffic, kills and races, everything checked
	$(PYTHON) tools/install.py --for test
	$(BIN)/python -m pytest -m soak -s

docs: ## install, then build the handbook into site/
	$(PYTHON) tools/install.py --for test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

screenshots: ## install, then take the handbook's pictures anew; after make demo
	$(PYTHON) tools/install.py --for test
	$(BIN)/python tools/screenshots.py

check: lint types layers ## everything that needs no test run

lint: ## ruff
	$(PYTHON) tools/install.py --for test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: ## mypy --strict
	$(BIN)/mypy

layers: ## import-linter: which room may import which
	$(BIN)/lint-imports

format: ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what the commands above made
	rm -rf .venv .venv-sae-peers .vllm-next demo dist site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
