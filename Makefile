# Two commands: `make demo` and `make test`. Both set up .venv first; a second run does no work twice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_TO_RUN := $(VENV)/.ready-to-run
RUN ?= runs/demo
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# pip would compile every module of torch on one core, most of them never imported; Python compiles what it imports.
PIP = $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable

.PHONY: demo test lint clean

demo: $(READY_TO_RUN)
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/whimbrel demo --run-dir $(RUN)

test: $(READY)
	@# As below: compiling our own modules costs each of some hundred processes half a second.
	@$(BIN)/python -m compileall -q -j 0 src tests benchmarks >/dev/null || true
	$(BIN)/python -m pytest -n 2 --dist loadfile $(TESTS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	@# Tests lie beside the code and may import anything, so the rules are checked on a copy without them.
	rm -rf build/imports && mkdir -p build/imports
	tar -C src --exclude='test_*.py' -cf - whimbrel | tar -C build/imports -xf -
	PYTHONPATH=build/imports $(BIN)/lint-imports --no-cache

# What the demo needs is a fraction of what the tests need, most of it torch.
$(READY_TO_RUN): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else \
	  f"whimbrel needs Python 3.11 or newer, {sys.executable} is {v[0]}.{v[1]}; run make PYTHON=python3.11")'
	@echo "set-up: installing torch and what else the demo needs into $(VENV): 1 GB, or several with CUDA's libraries"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) .
	@touch $@

$(READY): $(READY_TO_RUN)
	@echo "set-up: installing what the tests need into $(VENV), about 2 GB more"
	@$(PIP) '.[dev]'
	@# Tests start many processes, also where nobody lets Python keep what it compiled.
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null || true
	@touch $@

clean:
	rm -rf $(VENV) runs
