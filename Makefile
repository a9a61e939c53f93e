# Every target creates the environment first if it is not there (infra/setup.sh).
# DATA=DIR makes `demo` use a real log (the KuaiRand release) instead of generated data.

PY := .venv/bin/python
DATA ?=
# Run by name alone: the demo takes minutes and empties its folder, accuracy needs published days of a real log.
BENCHMARKS := $(filter-out demo accuracy,$(patsubst benchmarks/%.py,%,$(shell grep -l "^def main" benchmarks/*.py)))

.DEFAULT_GOAL := help
.PHONY: help env demo ui test test-fast torchrec lint format bench docs wheel notices holes screenshots pictures clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

env: ## create .venv from constraints.txt
	@bash infra/setup.sh

demo: env ## run three days of the whole pipeline through Airflow, from nothing
	@$(PY) -m examples.demo $(if $(DATA),--data "$(DATA)")

ui: env ## open Airflow, MLflow and Data Docs on loopback: of onetrans.toml, else of the demo; until Ctrl-C
	@$(PY) -m infra.local

test: env ## run all tests but the nightly ones
	$(PY) -m pytest -m "not nightly"

test-fast: env ## run the tests that need no Spark, Airflow or MLflow
	$(PY) -m pytest -m "fast and not nightly"

# TorchRec asks for fbgemm-gpu, whose CUDA build would be installed over the CPU build: so it comes without what it asks
# for, and that by name.
torchrec: env ## add TorchRec with FBGEMM for CPUs, for training.shard_rows (with GPUs: pip install --editable '.[torchrec]')
	$(PY) -m pip install --quiet --constraint constraints.txt --no-deps torchrec fbgemm-gpu-cpu
	$(PY) -m pip install --quiet --constraint constraints.txt --no-warn-conflicts tensordict torchmetrics pyre-extensions
	$(PY) -c "import torchrec.distributed.embedding"

lint: env ## style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: env ## rewrite files in the project's style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

define quick_benchmark
@echo "== benchmarks.$(1) --quick"
@$(PY) -m benchmarks.$(1) --quick

endef

bench: env ## run the quick benchmarks
	$(foreach name,$(BENCHMARKS),$(call quick_benchmark,$(name)))

docs: env ## build the pages as a site in build/site; a link or heading that is not there fails
	$(PY) -m sphinx -q -W --keep-going -c docs -d build/doctrees . build/site
	@echo "build/site/docs/index.html"

wheel: env ## build the wheel in dist/
	$(PY) -m build --wheel --no-isolation

notices: env ## write THIRD_PARTY.md, and fail on a licence that would bind users
	$(PY) -m infra.notices > THIRD_PARTY.md

holes: ## ask PyPI's service which pinned versions have known holes (installs pip-audit in an environment of its own)
	python3 -m venv build/audit
	build/audit/bin/python -m pip install --quiet pip-audit==2.10.1
	build/audit/bin/python -m pip_audit --no-deps --disable-pip --requirement constraints.txt

screenshots: env ## take the pictures of docs/airflow.md again (needs Chromium)
	$(PY) -m infra.local.screenshots

pictures: env ## take the pictures of MLflow, the verdict and Data Docs, of what make ui would show (needs Chromium)
	$(PY) -m infra.local.result_pictures

clean: ## remove everything a run wrote (var/) and the environment
	rm -rf var .venv build dist *.egg-info spark-warehouse
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
