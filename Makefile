# What can be done here; `make` alone lists it.
BIN := .venv/bin
CHECKED := src tests examples benchmarks scripts/demo.py

.PHONY: help setup setup-for-tests demo test test-slow bench docs format clean

help: ## List what can be done
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | while IFS='|' read -r name what; do printf '  make %-10s %s\n' "$$name" "$$what"; done

setup: ## Prepare everything: system packages (as root), .venv, dependencies
	@scripts/setup

setup-for-tests:
	@scripts/setup --for-tests

demo: setup ## Start Aeolian, run a real app on it, stop it, leave nothing behind
	@$(BIN)/python scripts/demo.py

test: setup-for-tests ## Check the code and run the tests
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -m "not slow and not gpu"

test-slow: setup-for-tests ## Run the long tests too
	$(BIN)/pytest -m "not gpu"

bench: setup ## Measure, beside a server that does nothing
	@$(BIN)/python benchmarks/calls.py
	@$(BIN)/python benchmarks/autoscaler
	@$(BIN)/python benchmarks/web.py

docs: setup ## Write the generated pages of docs/
	$(BIN)/python -m aeolian.protocol.compatibility docs/compatibility.md

format: setup ## Format the code
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

clean: ## Remove .venv and caches
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
