# `make demo` and `make test` each make the virtual environment they need; only Python, pip and make must be there.
PYTHON ?= python3
CONSTRAINTS := constraints.txt

.PHONY: demo test lint families clean

demo: .venv/demo.stamp
	.venv/demo/bin/mui-callback demo $(ARGS)

test: lint
	.venv/dev/bin/python -m pytest $(ARGS)

lint: .venv/dev.stamp
	.venv/dev/bin/ruff check .
	.venv/dev/bin/ruff format --check .
	.venv/dev/bin/mypy
	.venv/dev/bin/lint-imports
	.venv/dev/bin/pre-commit validate-config

families: .venv/dev.stamp
	cd tests && ../.venv/dev/bin/python families_table.py

.venv/demo.stamp: EXTRAS := hf,wandb,study
.venv/dev.stamp: EXTRAS := dev
.venv/%.stamp: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv/$*
	.venv/$*/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) torch
	.venv/$*/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf .venv
