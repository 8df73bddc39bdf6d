# Two commands matter: `make demo` and `make test`. Each sets up .venv by itself and can be repeated.
#
#   make demo   PORT=8501 RUNS=runs PRESET=demo HEADLESS=1   a real RL run, live in the browser
#   make test   the whole suite, real browser included       make test-slow   the minutes-long ones
#   make test-trl TRL=0.20.0  the tests of the TRL adapter with another version of TRL, in an environment of its own
#   make test-verl            the tests of the verl adapter, with verl in a folder of its own (300 MB)
#   make test-openrlhf        the tests of the OpenRLHF adapter, with its own loss and actor in place of stand-ins
#   make lint   ruff, mypy                                   make bench       measurements, printed as tables
#   make bench-alarms RUNS=folder   alarm engines on labelled runs   WRITE=real or induced keeps the figures
#
# PIP_ARGS is passed to pip. On Linux without a GPU, PyTorch's own index has a build without CUDA:
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
PORT ?= 8501
RUNS ?= runs
PRESET ?= demo
HEADLESS ?=
PIP_ARGS ?=
TRL ?= 1.16.0
WRITE ?=

VENV := .venv
BIN := $(VENV)/bin
RUN_STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-test
TRL_VENV := $(VENV)/trl-$(TRL)

.PHONY: demo test test-slow test-trl test-verl test-openrlhf lint bench bench-alarms clean

demo: $(RUN_STAMP)
	@exec $(BIN)/mhpo demo --preset $(PRESET) --out "$(RUNS)" --port $(PORT) $(if $(filter-out 0,$(HEADLESS)),--headless)

test: $(TEST_STAMP)
	$(BIN)/python -m tests.e2e.browser
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-slow: $(TEST_STAMP)
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

test-trl: $(TRL_VENV)/.installed
	$(TRL_VENV)/bin/python -m pytest tests/collectors/adapters/test_trl.py $(PYTEST_ARGS)

# torch and the rest come from .venv, by a path file; pip adds TRL and what it needs in another version. TRL before
# 0.29 was made for transformers 4, and sets no bound.
SITE := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
$(TRL_VENV)/.installed: $(TEST_STAMP)
	rm -rf $(TRL_VENV)
	$(BIN)/python -m venv $(TRL_VENV)
	$(BIN)/python $(SITE) > "$$($(TRL_VENV)/bin/python $(SITE))/outer.pth"
	$(TRL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-warn-conflicts $(PIP_ARGS) trl==$(TRL) \
		$(if $(filter $(addsuffix .%,0.20 0.21 0.22 0.23 0.24 0.25 0.26 0.27 0.28),$(TRL)),'transformers<5')
	@touch $@

test-verl: $(VENV)/verl/.installed
	PYTHONPATH=$(VENV)/verl OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/collectors/adapters/test_verl.py $(PYTEST_ARGS)

# the wheel has a package `tests` of its own, so this folder comes first; a first torch.compile takes minutes
test-openrlhf: $(TEST_STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/openrlhf openrlhf==0.11.2 peft==0.21.2
	PYTHONPATH=$(CURDIR):$(VENV)/openrlhf TORCHDYNAMO_DISABLE=1 $(BIN)/python -m pytest tests/collectors/adapters/test_openrlhf.py $(PYTEST_ARGS)

# --no-deps: what verl pins would replace torch, transformers and others of .venv
$(VENV)/verl/.installed: tests/collectors/adapters/verl-requirements.txt $(TEST_STAMP)
	rm -rf $(VENV)/verl
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps --target $(VENV)/verl -r $<
	@touch $@

lint: $(TEST_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(TEST_STAMP)
	$(BIN)/python -m tests.e2e.browser
	$(BIN)/python -m tests.benchmarks

# other tools' code is used where it is in the folder that the table names
bench-alarms: $(TEST_STAMP)
	PYTHONPATH=$(VENV)/alarm-peers OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.alarms "$(RUNS)" $(if $(WRITE),--write $(WRITE))

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: $$($(PYTHON) --version) is too old, Python 3.11 or newer is needed. Give one with PYTHON=python3.12." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(RUN_STAMP): pyproject.toml constraints.txt | $(VENV)/.created
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e .
	@touch $@

$(TEST_STAMP): $(RUN_STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis artifacts
