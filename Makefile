# selbp: `make demo` trains on real data, `make test` runs the fast tests. `make help` lists the rest.
#
# PYTHON     the interpreter to build the environment from       (python3)
# VENV       where the environment goes                          (.venv)
# TORCH      auto | a pip requirement such as torch==2.13.0      (auto: see scripts/environment.sh)
# PIP_ARGS   handed to every pip install, for example an index
# ARGS       handed to the command that a target runs
# SELBP_CUDA 0 | 1: without the CUDA core, or with it            (auto: with it wherever there is nvcc; see setup.py)

PYTHON ?= python3
VENV ?= .venv
TORCH ?= auto
PIP_ARGS ?=
ARGS ?=
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(shell find csrc -type f)
export PYTHON VENV TORCH PIP_ARGS

.PHONY: help demo test test-all test-frameworks test-frameworks-old test-versions test-compilers test-aarch64 sanitize wheel lint format bench study study-quick study-full study-explore study-confirm study-document docs gpu-check clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       install, then train Fashion-MNIST with seven ways of choosing; prints a table and a page"
	@echo "make test       install for development and run the fast tests"
	@echo "make test-all   every test, the slow ones included; the kernels on every supported Triton, the rows' rules on torch,"
	@echo "                the integrations in old frameworks"
	@echo "make test-frameworks  the fast tests in the newest Transformers, TRL, Accelerate and Lightning;"
	@echo "                test-frameworks-old: in those of two years ago, in an environment of their own"
	@echo "make test-versions  the fast suite on five torch releases, 2.6 to 2.15, in environments of their own; a table"
	@echo "make test-compilers the native core by every supported compiler, without warnings, and its tests"
	@echo "make test-aarch64   the native core cross-compiled and run in qemu; part of test-all"
	@echo "make sanitize   the CPU core under the address, undefined-behaviour and thread sanitizers (GCC); part of test-all"
	@echo "make lint       ruff, mypy, clang-format"
	@echo "make format     let ruff and clang-format rewrite the sources"
	@echo "make bench      ours against peers and against this machine's roofline, in one run"
	@echo "make study      the comparison with random: equal steps, samples and time; under 2 hours on two cores"
	@echo "make study-quick   the same in little, under 10 minutes; study-full: more models, for longer, and a text:"
	@echo "                   about 2 core-hours, resumable; study-explore: what else was tried, about 70 core-minutes;"
	@echo "                   study-confirm: named arms on fresh seeds; study-document: the study's page from the results"
	@echo "make docs       the documentation as a site: build/docs/index.html"
	@echo "make wheel      the sdist, and repaired wheels for the interpreters at hand; SELBP_CUDA=1 with the CUDA core"
	@echo "make gpu-check  on a machine with a GPU: parity, bits, sanitizer, operators, selection, steps, graph; a table;"
	@echo "                ARGS=--quick: in minutes; ARGS='--only steps --out FOLDER --budget SECONDS' for a part,"
	@echo "                which goes on where it ended"
	@echo "make clean      remove the environment and everything built"

$(VENV)/.torch:
	@bash scripts/environment.sh

# One editable install per set of extras; rebuilt when a native source changes.
$(VENV)/.with-%: $(VENV)/.torch $(SOURCES)
	@echo "selbp: building the native core and installing with [$*]"
	@$(BIN)/python scripts/install.py "$*"
	@touch $@

# Further packages beside the project as it is built.
$(VENV)/.beside-%: pyproject.toml | $(VENV)/.with-test
	@echo "selbp: installing beside it what [$*] asks for"
	@$(BIN)/python scripts/install.py --beside "$*"
	@touch $@

demo: $(VENV)/.with-demo
	$(BIN)/selbp compare --preset demo $(ARGS)

# Two workers of one thread each: spinning OpenMP threads of two processes would fight over two cores.
test test-all test-frameworks test-frameworks-old: export OMP_NUM_THREADS = 1

test: $(VENV)/.with-test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu" $(ARGS)

# New examples in each run: what the fast tests draw is always the same.
test-all: export HYPOTHESIS_PROFILE = random
test-all: $(VENV)/.with-dev $(VENV)/.beside-integrations
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu" $(ARGS)
	bash scripts/test_frameworks.sh old
	bash scripts/triton_versions.sh 3.6.0 3.8.0 3.9.0
	TESTS="tests/rows" bash scripts/test_torch_versions.sh
	bash scripts/sanitize.sh
	bash scripts/test_aarch64.sh

test-frameworks: $(VENV)/.beside-integrations
	bash scripts/test_frameworks.sh newest $(ARGS)

test-frameworks-old: $(VENV)/.with-test
	bash scripts/test_frameworks.sh old $(ARGS)

test-versions:
	bash scripts/test_torch_versions.sh $(ARGS)

test-aarch64:
	bash scripts/test_aarch64.sh

test-compilers: $(VENV)/.with-dev
	bash scripts/test_compilers.sh $(ARGS)

sanitize: export OMP_NUM_THREADS = 1

sanitize: $(VENV)/.with-dev
	bash scripts/sanitize.sh

lint: $(VENV)/.with-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files '*.cpp' '*.hpp' '*.cu' '*.cuh' | xargs -r $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/.with-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.cpp' '*.hpp' '*.cu' '*.cuh' | xargs -r $(BIN)/clang-format -i

# Peers that no extra names, for two are wanted without their dependencies; one that does not install is left out.
$(VENV)/.with-peers: $(VENV)/.with-bench
	-$(BIN)/python -m pip install -q $(PIP_ARGS) --only-binary :all: spams-bin
	-$(BIN)/python -m pip install -q $(PIP_ARGS) --no-deps cords mosaicml
	@touch $@

bench: $(VENV)/.with-peers
	$(BIN)/python -m benchmarks $(ARGS)

# One folder for all of them: what they share is run once, and an interrupted one goes on.
study: $(VENV)/.with-demo
	$(BIN)/selbp study --protocol main --results benchmarks/results $(ARGS)

study-full: $(VENV)/.with-demo
	$(BIN)/selbp study --protocol full --results benchmarks/results $(ARGS)
	$(BIN)/selbp study --protocol long --results benchmarks/results $(ARGS)

study-confirm: $(VENV)/.with-demo
	$(BIN)/selbp study --protocol confirm --results benchmarks/results $(ARGS)
	$(BIN)/selbp study --protocol confirm-bfloat16 --results benchmarks/results $(ARGS)
	$(BIN)/selbp study --protocol confirm-loss --results benchmarks/results $(ARGS)

study-explore: $(VENV)/.with-demo
	$(BIN)/selbp study --protocol explore --results benchmarks/results $(ARGS)

study-quick: $(VENV)/.with-demo
	$(BIN)/selbp study --protocol quick --out runs/study-quick $(ARGS)

study-document: $(VENV)/.with-demo
	$(BIN)/selbp study --render benchmarks/results --out docs/measurements/study.md

# Offline once the packages are there; every warning and every name that leads nowhere is an error.
docs: $(VENV)/.with-docs
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

wheel: $(VENV)/.with-dev
	bash scripts/wheels.sh $(ARGS)

# Little is asked for, since a machine with a GPU may have no network; what else is there is used.
gpu-check: $(VENV)/.with-triton
	$(BIN)/python scripts/gpu_check.py $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find selbp -name '_native*.so' -delete
