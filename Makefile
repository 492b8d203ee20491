# `make run` and `make test` are all a fresh machine needs.

# The first interpreter that runs and fits: a shim of that name may be on PATH and fail.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
	>/dev/null 2>&1 && echo "$$p" && break; done)
PIP_INSTALL := -m pip install --disable-pip-version-check --require-hashes --no-deps
# Poetry only chooses versions here; it is not to make an environment of its own.
POETRY := POETRY_VIRTUALENVS_CREATE=false .venv-poetry/bin/python -m poetry --no-interaction

.DEFAULT_GOAL := help
.NOTPARALLEL:  # two installs into one environment would trip each other up
.PHONY: help run test check format bench docs lock lock-check clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

run: .venv/.run-installed ## Start the server on http://127.0.0.1:8000
	.venv/bin/python -m app.server

test: .venv/.dev-installed ## Run the tests (PYTEST_ARGS="-k word" picks some)
	.venv/bin/python -m pytest $(PYTEST_ARGS)

check: .venv/.dev-installed lock-check ## Check format, lint, types, imports, spelling, lock and docs
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m ruff check .
	.venv/bin/python -m mypy
	.venv/bin/lint-imports
	.venv/bin/python -m codespell_lib
	.venv/bin/python -m pytest -q tests/rules/test_docs.py

format: .venv/.dev-installed ## Format the code, and mend what ruff can mend
	.venv/bin/python -m ruff format .
	.venv/bin/python -m ruff check --fix .

bench: .venv/.run-installed ## Measure speech on this machine
	.venv/bin/python -m bench

docs: .venv/.dev-installed ## Test the documentation
	.venv/bin/python -m pytest tests/rules/test_docs.py

lock: .venv-poetry/.installed ## Bring the lock in step (LOCK_ARGS=--regenerate takes the newest)
	$(POETRY) lock $(LOCK_ARGS)
	$(POETRY) export --output requirements/run.txt
	$(POETRY) export --all-groups --output requirements/dev.txt

lock-check: .venv-poetry/.installed ## Check that the lock is in step with pyproject.toml
	@{ $(POETRY) check --lock \
	&& $(POETRY) export | diff -q requirements/run.txt - \
	&& $(POETRY) export --all-groups | diff -q requirements/dev.txt -; } || { echo \
	'pyproject.toml, poetry.lock and requirements/ are not in step: run `make lock`.' >&2; exit 1; }

clean: ## Remove environments and caches
	rm -rf .venv .venv-poetry .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find app bench tests -name __pycache__ -prune -exec rm -rf {} +

# The stamps are newer than what they were made from, so a second run does not even ask pip.
.venv/.created .venv-poetry/.created:
	@test -n "$(PYTHON)" || { echo 'No Python 3.11, 3.12 or 3.13 that runs is on PATH.' \
	'Install one, or name it: make PYTHON=/path/to/python3 run' >&2; exit 1; }
	"$(PYTHON)" -m venv --clear $(@D)
	@touch $@

.venv/.run-installed: .venv/.created requirements/run.txt
	.venv/bin/python $(PIP_INSTALL) -r requirements/run.txt
	@touch $@

.venv/.dev-installed: .venv/.created requirements/dev.txt
	.venv/bin/python $(PIP_INSTALL) -r requirements/dev.txt
	@touch .venv/.run-installed $@  # dev.txt holds all of run.txt

.venv-poetry/.installed: .venv-poetry/.created requirements/poetry.txt
	.venv-poetry/bin/python $(PIP_INSTALL) --quiet -r requirements/poetry.txt
	@touch $@
