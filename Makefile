# `make` lists the verbs. Each does the set-up that it needs first (scripts/setup.sh) and can be run again at any time.

PYTEST_WORKERS ?= 2
# Under CI pytest explains a failed comparison in full, whatever its size: minutes for the tensors that tests with a
# planted fault compare.
PYTEST_ENV = env -u CI -u BUILD_NUMBER

# Every op, indices out of bounds, replay, a training run: some minutes on SwiftShader. DAWN_OPS picks ops, as pytest's -k.
DAWN_TESTS ?= tests/ops/test_indices_from_data.py tests/ops/test_matrix_int8.py tests/gpu/test_replay.py tests/train/test_replay_training.py \
	tests/model/test_spec_walk.py
DAWN_OPS ?=

# What to run before a commit, before a push, before a merge; docs/tests.md says what is where.
TIER1 = tests/quant tests/adapters/test_qlora_properties.py tests/adapters/test_pattern.py
TIER2 = tests/adapters/test_adapters.py tests/compiler/test_autodiff.py tests/compiler/test_plan.py tests/ops/test_ops.py \
	tests/train/test_schedule.py tests/train/test_falsification.py
TIER3 = tests/files tests/fuzz tests/gpu/test_replay.py tests/gpu/test_failures.py tests/ops/test_kernels.py \
	tests/compiler/test_memory.py tests/train/test_training.py tests/train/test_resume.py tests/export tests/test_architecture.py

.DEFAULT_GOAL := help
.PHONY: help setup docs-test demo test tier1 tier2 tier3 fuzz kills dawn gpu-test wgsl parity llama-cpp serve-test check format bench clean tools browser receivers models smollm real parity-setup profile-setup \
	profile-llama profile-llama-otlp profile-llama-anomaly

help: ## List the verbs
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "make %-22s %s\n", $$1, $$2 }'

setup: tools ## Make .venv and see that there is a GPU adapter, if need be Mesa's software Vulkan
	@scripts/setup.sh run

demo: setup ## Fine-tune the model that ships with the project on Python's docstrings
	@.venv/bin/entrenar-gpu demo

test: setup ## Run every test but the comparison with PyTorch
	@$(PYTEST_ENV) .venv/bin/pytest -m "not parity" --ignore=tests/parity --ignore=tests/real --require-gpu -n $(PYTEST_WORKERS)

tier1: tools ## Unit and property tests of quantisation and adapters: under 5 s once warm
	@$(PYTEST_ENV) .venv/bin/pytest -q $(TIER1)

tier2: tools ## tier1, gradients, graphs and convergence, none on a GPU: under 30 s
	@$(PYTEST_ENV) .venv/bin/pytest -q -n $(PYTEST_WORKERS) $(TIER1) $(TIER2)

tier3: setup ## tier2, files, faults, kernels and training on the GPU: under 5 minutes
	@$(PYTEST_ENV) .venv/bin/pytest -q -m "not slow" --require-gpu -n $(PYTEST_WORKERS) $(TIER1) $(TIER2) $(TIER3)

dawn: setup ## Run ops, a training run and a resume through the second engine, Dawn, on SwiftShader if need be
	@scripts/setup.sh dawn
	@$(PYTEST_ENV) ENTRENAR_ENGINE=dawn scripts/with_dawn_driver .venv/bin/pytest -q --require-gpu -n $(PYTEST_WORKERS) $(DAWN_TESTS)
	@$(PYTEST_ENV) ENTRENAR_ENGINE=dawn scripts/with_dawn_driver .venv/bin/pytest -q --require-gpu -n $(PYTEST_WORKERS) \
		tests/ops/test_kernels.py::test_every_tensor_equals_the_reference $(if $(DAWN_OPS),-k "$(DAWN_OPS)")

gpu-test: setup ## Run the tests of kernels and training on this machine's GPU, matrix units included
	@scripts/setup.sh dawn
	@$(PYTEST_ENV) .venv/bin/pytest -q --require-gpu tests/ops tests/gpu tests/train

wgsl: setup ## Have Tint, Dawn's compiler, parse and type every shader (needs npm; no GPU)
	@mkdir -p build/wgsl && cp scripts/wgsl_check.mjs build/wgsl/
	@cd build/wgsl && npm install --silent --no-save --no-audit --no-fund webgpu@0.6
	@PYTHONPATH=. .venv/bin/python scripts/wgsl_texts.py >build/wgsl/texts.json
	@cd build/wgsl && node wgsl_check.mjs <texts.json

parity: parity-setup ## Compare with torch, transformers, peft and bitsandbytes (makes .venv-parity)
	@$(PYTEST_ENV) .venv-parity/bin/pytest -m parity --require-gpu tests/parity tests/real

real: models ## Compare two pretrained models with transformers and PEFT: losses, steps, answers (two hours on a CPU)
	@.venv-parity/bin/python -m tests.real.compare
	@.venv-parity/bin/python -m tests.real.greedy
	@.venv-parity/bin/python -m tests.real.gguf

llama-cpp: parity-setup ## Have llama.cpp itself read what is written for it (npm; make models first)
	@mkdir -p build/llama-cpp && cp scripts/llama_cpp_check.mjs build/llama-cpp/
	@cd build/llama-cpp && npm install --silent --no-save --no-audit --no-fund --ignore-scripts node-llama-cpp@3.21.1
	@$(PYTEST_ENV) .venv-parity/bin/pytest -m parity tests/parity/test_gguf_parity.py

fuzz: setup ## Damage files for every reader for MINUTES (default 1); what is found is kept as a test
	@.venv/bin/python -m tests.fuzz --minutes $(or $(MINUTES),1)

kills: setup ## End a small run at N (default 20) random moments, and see that it goes on to the bit
	@.venv/bin/python -m tests.fuzz.kills $(or $(N),20)

serve-test: setup ## Put a server under 32 clients, some of them rude, for N requests (default 1000)
	@.venv/bin/python -m tests.load.server --requests $(or $(N),1000)

check: tools ## Lint, check the format and the types
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check
	@for system in linux darwin win32; do .venv/bin/mypy --platform $$system || exit 1; done

format: tools ## Rewrite the code in the project's format
	@.venv/bin/ruff check --fix --quiet
	@.venv/bin/ruff format

bench: ## Say how to measure speed and memory
	@echo "After make setup, on the GPU to be measured:"
	@echo "  .venv/bin/entrenar-gpu bench train --shape qwen3-4b --batch 1 --seq 512 --rank 16 --precision f32 --steps 20 --json"
	@echo "Weights are random and made on the GPU; nothing is downloaded. All options: .venv/bin/entrenar-gpu bench train --help"
	@echo "Beside transformers + PEFT + bitsandbytes, where those are installed: python -m benchmarks.qwen3_4b"
	@echo "Loading a checkpoint: python -m benchmarks.loading. Low precisions' quality: python -m benchmarks.precision"

profile-llama: profile-setup ## Profile a training run: system calls and functions
	@scripts/profile_llama

profile-llama-otlp: profile-setup ## The same, with spans sent to an OpenTelemetry collector
	@scripts/profile_llama --otlp

profile-llama-anomaly: profile-setup ## The same, with the anomaly report
	@scripts/profile_llama --anomaly

docs-test: ## Run README's way from nothing to a tuned SmolLM2 and its GGUF in a fresh environment (make models first)
	@scripts/docs_test

models: ## Fetch two small pretrained models and convert them, once, into artifacts/models (about 1 GB with what it needs)
	@scripts/setup.sh models
	@.venv-parity/bin/python scripts/make_models.py

smollm: ## Fetch the smaller of them alone, which make parity takes a few steps of where it is there
	@scripts/setup.sh models
	@.venv-parity/bin/python scripts/make_models.py smollm2

receivers: ## Send a run to two real backends, Phoenix and MLflow, and read its spans back (makes .venv-receivers)
	@scripts/setup.sh receivers
	@.venv-receivers/bin/python -m tests.receivers

browser: ## Install Chromium, which the test of the HTML report opens
	@scripts/setup.sh browser

clean: ## Remove the environments, caches and builds; runs/ stays
	rm -rf .venv .venv-parity .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

tools:
	@scripts/setup.sh tools

parity-setup:
	@scripts/setup.sh parity

profile-setup:
	@scripts/setup.sh profile
