PYTHON ?= python3
VENV ?= .venv
OUT ?= out
# Test workers; more than the cores gains nothing, and each one holds a torch of its own.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -lt 8 ] && echo $$n || echo 8)

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Threads that spin while they wait starve the other process on a small or busy machine. What the
# benchmarks measure is what a user's command does, who sets neither.
demo test: export OMP_WAIT_POLICY ?= PASSIVE
demo test: export GOMP_SPINCOUNT ?= 0

.PHONY: help setup demo test lint format schema bench-compile-time bench-train-step bench-accuracy bench-engine-types bench-models bench-models-trained bench-gpu-gemm clean
.DEFAULT_GOAL := help

help: ## Say what can be made
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 22

setup: $(STAMP) ## Make the virtual environment .venv with everything in it

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,rtx,models]'
	@touch $@

demo: setup ## Compile the digits model end to end: fine-tune, ONNX, engine, report
	$(BIN)/gpusq-compile examples/digits_vit.py --rules int8 -o $(OUT)/digits
	@echo
	@echo 'Look at:  $(OUT)/digits/report.html    what was done to each layer, why, and what it cost'
	@echo '          $(OUT)/digits/report.json    the same for programs'
	@echo '          $(OUT)/digits/model.onnx     2:4-sparse INT8 weights, for ONNX Runtime and TensorRT'
	@echo '          $(OUT)/digits/engine/        the engine built from it'
	@echo 'or run:   $(BIN)/gpusq-report $(OUT)/digits'

test: setup ## Run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: setup ## Check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: setup ## Format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

schema: setup ## Write the generated files again: JSON schemas, docs/rules.md, docs/codes.md
	$(BIN)/python -m gpusq_compile.language
	$(BIN)/python -m gpusq_compile.report
	$(BIN)/python -m gpusq_compile.codes

bench-compile-time: setup ## Compile time and memory against nvidia-modelopt
	$(BIN)/python benchmarks/compile_time.py

bench-train-step: setup ## Time of a QAT step over a plain distillation step, and nvidia-modelopt's
	$(BIN)/python benchmarks/train_step.py

bench-accuracy: setup ## Accuracy against a dense control and nvidia-modelopt: about an hour on 2 cores
	@test -d "$${FASHION_MNIST:-/usr/share/datasets/fashion-mnist}" || { \
	  command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] && apt-get install -y dataset-fashion-mnist; } || { \
	  echo 'Fashion-MNIST is missing. Debian and Ubuntu: apt-get install -y dataset-fashion-mnist.'; \
	  echo 'Elsewhere set FASHION_MNIST to a folder with the four .gz files.'; exit 1; }
	$(BIN)/python benchmarks/accuracy.py

bench-engine-types: setup ## INT8 GEMMs and attentions in TensorRT-RTX engines of whole models: a quarter of an hour
	$(BIN)/python benchmarks/engine_types.py

bench-models: setup ## Compile every model family to INT8 and INT4: hours on 2 cores, keeps what it has
	$(BIN)/python benchmarks/models.py

bench-models-trained: setup ## Train the smallest of each model family a few steps while it is compiled: half an hour on 2 cores
	$(BIN)/python benchmarks/models_trained.py

bench-gpu-gemm: setup ## Dense and 2:4 GEMMs, FP16 and INT8, on an NVIDIA GPU
	$(BIN)/python benchmarks/gpu_gemm.py

clean: ## Remove what was built, but not .venv
	rm -rf $(OUT) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './benchmarks/.venv-peer/*' -prune -exec rm -rf {} +
