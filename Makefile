# Every target sets up what it needs on a fresh machine with Python >= 3.11 (PYTHON=python3.12 make ... picks another).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out/demo
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt

.PHONY: setup demo test check bench bench-kernels convergence clean

setup: $(VENV)/.exec

$(VENV)/.exec: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing muxtune and its executor into $(VENV) (a few minutes the first time)"
	@# torch first and by its exact pin: a range would bring several GB of CUDA packages
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@$(PIP) -e ".[exec]"
	@touch $@

$(VENV)/.dev: $(VENV)/.exec
	@echo "installing the test tools into $(VENV)"
	@$(PIP) -e ".[exec,dev]"
	@touch $@

demo: $(VENV)/.exec
	@$(BIN)/muxtune demo --out $(OUT)

test: $(VENV)/.dev
	@$(BIN)/python -m pytest tests

check: $(VENV)/.dev build/typed
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@MYPYPATH=build/typed $(BIN)/mypy --explicit-package-bases build/typed/muxtune tests

# Type checkers do not see setuptools' package-dir: links give them the import name (docs/house.md).
build/typed:
	@mkdir -p build/typed/muxtune
	@for floor in spec kernels sim policies executor profiler experiments; do ln -sfn ../../../$$floor build/typed/muxtune/$$floor; done

bench: $(VENV)/.dev
	@$(BIN)/python -m tests.bench

# On a machine without a CUDA device it says so and measures nothing.
bench-kernels: $(VENV)/.dev
	@$(BIN)/python -m tests.bench_kernels $(KERNEL_OUT)

# Curves and accuracies, no times: some minutes.
convergence: $(VENV)/.dev
	@$(BIN)/python -m tests.bench_convergence

clean:
	rm -rf build out .pytest_cache .mypy_cache .ruff_cache .hypothesis
