# Every target creates the environment first if it is not there (infra/setup.sh).
# DATA=DIR makes `demo` use a real log (the KuaiRand release) instead of generated data.

PY := .venv/bin/python
DATA ?=

.DEFAULT_GOAL := help
.PHONY: help env demo ui test test-fast lint format bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

env: ## create .venv from constraints.txt
	@bash infra/setup.sh

demo: env ## run three days of the whole pipeline through Airflow, from nothing
	@$(PY) -m examples.demo $(if $(DATA),--data "$(DATA)")

ui: env ## open Airflow, MLflow and Data Docs on loopback: of onetrans.toml, else of the demo; until Ctrl-C
	@$(PY) -m infra.local ui

test: env ## run all tests but the nightly ones
	$(PY) -m pytest -m "not nightly"

test-fast: env ## run the tests that need no Spark, Airflow or MLflow
	$(PY) -m pytest -m "fast and not nightly"

lint: env ## style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: env ## rewrite files in the project's style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: env ## run the quick benchmarks
	@set -e; for name in $$(ls benchmarks/*.py | xargs -n1 basename | sed 's/\.py//' | grep -vE '^(__init__|common|fitting)$$'); do \
		echo "== benchmarks.$$name --quick"; $(PY) -m benchmarks.$$name --quick; done

clean: ## remove everything a run wrote (var/) and the environment
	rm -rf var .venv build dist *.egg-info spark-warehouse
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
