# What people and CI call. Needs Python 3.11 or newer, git and make; everything else goes into .venv, in locked versions.
#
#   make quickstart           install, fetch pictures and weights, run the whole life of a small model
#   make quickstart CI=1      the same stages, a few minutes
#   make test                 install what tests need and run them; test-full adds the slow ones
#   make matrix               every encoder x connector x decoder, walked: writes docs/matrix.json
#   make lint types arch      style, types, import directions: what tests/house checks too
#   make bench [BENCH=name]   benchmarks/<name>.py, or all of them
#   make docs                 rewrite the generated pages, then check links and the map
#   make lock [UPGRADE=1]     resolve requirements/*.lock again
#   make clean                remove .venv and caches; runs/ and fetched packages stay
#
# torch is yours to choose: make quickstart TORCH=torch==2.12.0 TORCH_ARGS="--index-url <an index of CPU or CUDA builds>"

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.SUFFIXES:
.NOTPARALLEL:

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
TORCH ?= torch==2.13.0
TORCH_ARGS ?=
RECIPE ?= $(if $(filter-out 0 false no,$(CI)),quickstart-ci,quickstart)
BENCH ?= $(basename $(notdir $(wildcard benchmarks/*.py)))
UV_VERSION := 0.13.9

PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest
UNIT := not slow and not gpu

# A stamp is touched only after everything before it went well, so a failed install is tried again.
# The name of the torch stamp follows the choice: another choice is another install.
TORCH_STAMP := $(VENV)/.torch-$(shell printf '%s' '$(TORCH) $(TORCH_ARGS)' | cksum | cut -d' ' -f1)

.PHONY: quickstart test test-full matrix lint types arch bench docs lock clean fetch install install-dev

quickstart: install fetch
	$(BIN)/plait run $(RECIPE)
	$(if $(CI),@echo "quickstart-ci goes the whole way on few pictures and steps: that it learns too little to pass gates is no fault")

test: install-dev fetch
	@$(call pytest_all,$(UNIT))

test-full: install-dev fetch
	@$(call pytest_all,not gpu)

matrix: install-dev
	$(BIN)/python -m tests.matrix

# Two workers with a thread each: most tests keep one core busy. A file's tests stay in one of them, and so do its fixtures.
define pytest_all
OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist loadfile -m "$(1)"
endef

lint: install-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: install-dev
	$(BIN)/basedpyright

arch: install-dev
	$(BIN)/lint-imports
	$(PYTEST) tests/house/test_imports.py tests/house/test_map.py tests/house/test_size.py

bench: install-dev fetch
	for name in $(BENCH); do $(BIN)/python "benchmarks/$$name.py" || exit 1; done

docs: install-dev
	$(BIN)/plait config schema > $(VENV)/schema.json && mv $(VENV)/schema.json docs/recipe.schema.json
	$(PYTEST) tests/house/test_docs.py tests/house/test_map.py

fetch: | install
	$(BIN)/plait data fetch all

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# --- installing ------------------------------------------------------------------------------------------------------

install: $(VENV)/.quickstart $(TORCH_STAMP)
install-dev: $(VENV)/.dev $(TORCH_STAMP)

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer on PATH; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV) && touch $@

# The lock names every package and its hash, so pip resolves nothing and nothing else comes.
$(VENV)/.quickstart $(VENV)/.dev: $(VENV)/.%: requirements/%.lock pyproject.toml | $(VENV)/.created
	@SECONDS=0 && echo "Installing requirements/$*.lock ..." && \
	$(PIP) install --quiet --require-hashes --no-deps -r requirements/$*.lock && \
	$(PIP) install --quiet --no-deps --no-build-isolation -e . && \
	echo "Installed in $$SECONDS s (not part of any run time)" && \
	touch $@ $(if $(filter dev,$*),$(VENV)/.quickstart)

# After the lock, so that torch finds what it shares with us already here. Its vision and audio companions never come in.
$(TORCH_STAMP): | $(VENV)/.created
	$(if $(findstring torchvision,$(TORCH))$(findstring torchaudio,$(TORCH)),$(error TORCH takes torch alone))
	@SECONDS=0 && echo "Installing $(TORCH) ..." && \
	$(PIP) install --quiet $(TORCH) $(TORCH_ARGS) && \
	$(PIP) check && \
	echo "Installed in $$SECONDS s (not part of any run time)" && \
	rm -f $(VENV)/.torch-* && touch $@

# --- locking ---------------------------------------------------------------------------------------------------------

# One file for every Python >= 3.11 and every platform, hashed; torch and what only torch brings are left to TORCH.
# The user's lock is constrained by the developer's, so that both install the same versions.
BY_TORCH := torch triton $(addprefix cuda-,bindings pathfinder toolkit) \
	$(addprefix nvidia-,cublas cuda-cupti cuda-nvrtc cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse \
	cusparselt-cu13 nccl-cu13 nvjitlink nvshmem-cu13 nvtx)
COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
	--custom-compile-command "make lock" $(if $(UPGRADE),--upgrade) $(addprefix --no-emit-package ,$(BY_TORCH)) \
	--constraint requirements/constraints.txt

lock: | $(VENV)/.created
	@$(PIP) install --quiet uv==$(UV_VERSION)
	@echo "Resolving requirements/dev.lock and requirements/quickstart.lock ..."
	@$(COMPILE) --extra dev pyproject.toml --output-file requirements/dev.lock
	@$(COMPILE) --extra quickstart pyproject.toml --constraint requirements/dev.lock --output-file requirements/quickstart.lock
