# `make demo`, `make test` and `make test-all` each make .venv, install headstart into it, and run.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all lint clean

demo: .venv/installed
	$(BIN)/headstart demo

test: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-all: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m ''

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install -c constraints.txt torch
	$(BIN)/pip install -c constraints.txt -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv
