# Every target sets up what it needs in .venv first; tools/setup_env.py says what the machine lacks.
#   make demo ARGS="--tokens 6000"      arguments for the demo, the tests or the benchmarks
#   make test PYTHON=python3.12         the interpreter that .venv is made with

PYTHON ?= python3
ARGS ?=
RUN := .venv/bin/python
SETUP := $(PYTHON) tools/setup_env.py --extra

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo serve-demo test test-vllm check lint bench studies matrix docs package clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

demo: ## a real model reads a long prompt, dense and with TriangleMix (minutes on a laptop CPU)
	@$(SETUP) demo
	@$(RUN) examples/trianglemix_quickstart.py $(ARGS)

serve-demo: ## vLLM serves a real model, dense and with TriangleMix, and an OpenAI client asks (minutes)
	@$(PYTHON) tools/setup_vllm.py
	@.vllm/bin/python examples/serve_vllm.py $(ARGS)

test: ## the tests, then those with a real vLLM in .vllm (3.5 GB); with ARGS, which are pytest's, the first alone
	@$(SETUP) dev
	@$(RUN) tools/run_tests.py $(ARGS)

test-vllm: ## the tests with a real vLLM alone (ARGS are pytest's)
	@$(PYTHON) tools/setup_vllm.py
	@.vllm/bin/python -m pytest tests_vllm $(ARGS)

lint: ## style and types, without the tests
	@$(SETUP) dev
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

check: lint test ## everything that has to pass: lint, then test

bench: ## the benchmarks; results go to benchmarks/results
	@$(SETUP) dev
	@$(RUN) -m benchmarks.run $(ARGS)

studies: ## what was found out once, measured again (hours); results go to benchmarks/results
	@$(SETUP) dev
	@$(RUN) -m studies.run $(ARGS)

matrix: ## what the pass does with every model of tests/support/zoo, into docs/support-matrix.md (half an hour)
	@$(SETUP) dev
	@$(RUN) tools/support_matrix.py $(ARGS)

docs: ## the pages and the API reference as a web site, into site/ (open site/index.html)
	@$(SETUP) docs
	@$(RUN) tools/build_docs.py $(ARGS)

package: ## build the package and try it in an empty environment (minutes; ARGS=--quick: seconds, without trying it)
	@$(SETUP) dev
	@$(RUN) tools/check_package.py $(ARGS)

clean: ## remove .venv, .npu, .vllm, caches and build outputs
	@rm -rf .venv .npu .vllm build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
