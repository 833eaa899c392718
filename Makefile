# make demo: set up, then the main job on data that needs no download.   make test: set up, lint, type-check, test.
# make observe: Prometheus and Grafana beside a running Ray head; make observe OBSERVE='--ray FOLDER': its folder, if not /tmp/ray.
PYTHON ?= python3
export OFFMANIFOLD_STORAGE ?= $(CURDIR)/results

.PHONY: demo test lint format observe clean

demo: .venv/installed
	.venv/bin/python jobs/ensemble_robustness.py quick

test: lint
	.venv/bin/pytest

lint: .venv/installed-dev
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

format: .venv/installed-dev
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

observe:
	@exec $(PYTHON) dashboards/observe.py $(OBSERVE)

clean:
	rm -rf .venv

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	.venv/bin/pip install --quiet --disable-pip-version-check --editable . --constraint constraints.txt
	touch $@

.venv/installed-dev: .venv/bin/python pyproject.toml constraints.txt
	.venv/bin/pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint constraints.txt
	touch .venv/installed $@
