# `make demo` and `make test` work from a fresh clone with python3, pip and make.
PYTHON ?= python3
VENV   ?= .venv
# Extra pip arguments, e.g. PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt $(PIP_ARGS)
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: help demo test check format bench fuzz chaos gpu clean
help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.run ## fine-tune the embedded model on the embedded task (under a minute)
	$(BIN)/bridge-peft finetune

test: $(VENV)/.dev ## the test suite with coverage, on all cores
	$(BIN)/python -m pytest -m "not gpu" -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder \
		--cov --cov-report=term

check: $(VENV)/.dev ## formatting, lint, types, import floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(VENV)/.dev ## apply ruff's formatting and fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev ## CPU benchmarks against the peers (about 16 minutes; QUICK=1 for three)
	$(BIN)/python benchmarks/bench_linear.py $(if $(QUICK),--quick)
	$(BIN)/python benchmarks/bench_linear.py --mixed $(if $(QUICK),--quick)
	$(BIN)/python benchmarks/bench_model.py $(if $(QUICK),--quick)

fuzz: $(VENV)/.dev ## 20,000 mutated adapter directories
	BRIDGE_PEFT_FUZZ_CASES=20000 $(BIN)/python -m pytest tests/test_formats_fuzz.py --timeout 3600

chaos: $(VENV)/.dev ## kill a run on two processes thirty times and resume it
	$(BIN)/python -m tests.chaos --kills 30

gpu: ## GPU tests and benchmarks with the CUDA torch of $(PYTHON) (nothing is installed)
	PYTHONPATH=src $(PYTHON) -m pytest -m gpu tests/gpu
	PYTHONPATH=src $(PYTHON) benchmarks/bench_linear.py
	PYTHONPATH=src $(PYTHON) benchmarks/bench_model.py

clean: ## remove the environment and run outputs
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .coverage

# torch comes first and pinned, so that no later package pulls another build of it.
$(VENV)/.torch: constraints.txt
	@echo "Setting up $(VENV) (once; a few minutes)"
	@$(PYTHON) -c 'import sys; sys.exit("bridge-peft needs Python 3.11 or newer; pass PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	@touch $@

$(VENV)/.run: $(VENV)/.torch pyproject.toml
	$(PIP) -e ".[finetune]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) -e ".[dev]"
	@touch $@ $(VENV)/.run
