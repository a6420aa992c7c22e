# make all      environment, then the whole matrix      (CORES=8 CONFIG=config/other.yaml GPUS=1)
# make check    lint, types and the fast tests: for every commit
# make test     environment, then all tests but those below
# make test-slow   training killed a hundred times, minutes
# make test-slurm  the matrix on a private Slurm, minutes; installs Slurm where it may (Debian, root)
# make mutants  break the code on purpose, one line at a time: do the tests notice?
# make env      the environment alone, in .venv
# make lint     ruff, snakefmt, snakemake --lint, import contracts, types
# make summarize   results/summary.* from what is there, without training
# make report   results/report.html from what is there, without training
# make unlock   after a kill -9 or a power loss: remove the lock that Snakemake left
# make clean    remove results and Snakemake's records of them; the environment stays

PYTHON ?= python3
CORES ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SNAKEMAKE := $(BIN)/snakemake $(if $(CONFIG),--configfile $(CONFIG)) --cores $(CORES) \
	$(if $(GPUS),--resources gpu=$(GPUS))
QUANTIZED := bitsandbytes torchao
SLURM := slurm-wlm slurm-wlm-basic-plugins munge

# Bytecode is kept in any case: without it each process compiles 3,000 files anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: all check test test-fast test-quantized test-slow test-slurm mutants env lint dry-run summarize report unlock unlocked clean config

all: env config unlocked
	$(SNAKEMAKE) all

# Lint and tests side by side, for two cores: the tests in one process, which imports torch once.
check: env
	$(MAKE) --jobs 2 lint test-fast

test-fast: env
	$(BIN)/python -m pytest -q -m 'not slow and not long and not other_bases' tests/unit tests/model

test: test-quantized
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/quantized

# The libraries of quantised bases have a folder of their own: where one is installed, peft imports it
# in every process.
test-quantized: env $(VENV)/quantized/.installed
	PYTHONPATH=$(VENV)/quantized $(BIN)/python -m pytest -q tests/quantized

$(VENV)/quantized/.installed: constraints.txt | $(VENV)/.made
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(@D) -c constraints.txt $(QUANTIZED)
	touch $@

test-slow: env
	$(BIN)/python -m pytest -m slow -s tests/slow

mutants: env
	$(BIN)/python tests/mutants.py --jobs $(CORES)

test-slurm: $(VENV)/.slurm
	$(BIN)/python -m pytest -m slurm tests/slurm

$(VENV)/.slurm: $(STAMP)
	@PATH="$$PATH:/usr/sbin" command -v slurmctld >/dev/null \
		|| { test "$$(id -u)" = 0 && apt-get update -qq \
			&& DEBIAN_FRONTEND=noninteractive \
				apt-get install -y -qq --no-install-recommends $(SLURM); } \
		|| echo 'Slurm cannot be installed here; as root: apt-get install $(SLURM)' >&2
	@touch $@

env: $(STAMP)

# Python compiles the 5,000 files that it imports; pip would take 80 s of CPU for all 19,000.
$(STAMP): pyproject.toml constraints.txt | $(VENV)/.made
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[all]'
	@touch $@

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: Python 3.11 or newer is needed; name one with PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# Snakemake's own message about a lock is long, and does not know `make unlock`.
unlocked:
	@! ls .snakemake/locks/* >/dev/null 2>&1 || { echo 'error: Snakemake is running in this' \
		'folder, or was killed there; after a kill: make unlock' >&2; exit 2; }

config:
	@test -z '$(CONFIG)' || test -f '$(CONFIG)' \
		|| { echo 'error: CONFIG=$(CONFIG): no such file' >&2; exit 2; }

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile rules
	$(BIN)/snakemake --lint
	$(BIN)/lint-imports
	$(BIN)/basedpyright --pythonpath $(BIN)/python

dry-run: env config
	$(SNAKEMAKE) --dry-run all

summarize: env config unlocked
	$(SNAKEMAKE) summarize

report: env config unlocked
	$(SNAKEMAKE) report
	@echo results/report.html

unlock: env
	$(SNAKEMAKE) --unlock

clean:
	rm -rf .snakemake
	find results -mindepth 1 -maxdepth 1 ! -name README.md -exec rm -rf {} +
