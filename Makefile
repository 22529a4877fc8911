# Each target sets itself up: a virtual environment in .venv, made once and made anew when the
# requirements change. Nothing but Python 3.11 (or newer), pip and make is assumed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready
# one thread a process: on a few shared cores more threads only wait for each other
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo test check fmt bench torture

demo: $(READY)
	$(BIN)/crosstill demo

# a file's tests stay together, so that what they share is made once; a third worker uses the time in
# which the others wait for servers and browsers
test: $(READY)
	$(PYTEST) -n 3 --dist loadfile

check: $(READY)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: $(READY)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: $(READY)
	$(BIN)/python -m benchmarks

torture: $(READY)
	$(PYTEST) -m slow -n 2

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[beit3,dev,export,hub,milvus,report,search]'
	touch $@
