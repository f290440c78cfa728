# make quickstart   sets up .venv, makes the shards, trains, evaluates and exports a small sparse ViT
# make test         sets up .venv, runs all tests, three files at a time; PYTEST_ARGS="-k config" picks some
# make test-fast    the same without the tests that start processes or take long
# make lint         sets up .venv, checks style and types
#
# PYTHON is the interpreter .venv is made from, RANKS the number of processes that train, RUN_DIR where the run goes.

PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
# In the recipes' PATH, so that DeepSpeed finds ninja there and starts its ranks with this Python.
IN_VENV := PATH="$(BIN):$$PATH"
SHARDS := data/mnist5k
# On 2 cores too: tests wait for one another's ranks and for launchers a third of the time. Where a process of pytest dies, the
# run ends: a new one would die in the same test.
THREE_AT_A_TIME := -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

# At most 2 GPUs, or 2 processes where there is none. It is expanded where a recipe uses it, after .venv is ready.
RANKS ?= $(shell $(BIN)/python -c "import torch; print(min(torch.cuda.device_count(), 2) or 2)")
# The first free one of runs/quickstart, runs/quickstart-2, ... for the whole recipe, which makes it.
RUN_DIR ?= $(shell run=runs/quickstart; n=1; while [ -e $$run ]; do n=$$((n + 1)); run=runs/quickstart-$$n; done; echo $$run)
RUN_DIR := $(RUN_DIR)

.PHONY: quickstart test test-fast lint compiler
.NOTPARALLEL:

quickstart: compiler $(SHARDS)/.made
	$(IN_VENV) deepspeed --num_gpus $(RANKS) launch/train.py --config configs/quickstart.yaml run_dir=$(RUN_DIR)
	$(IN_VENV) python launch/evaluate.py --run $(RUN_DIR)
	$(IN_VENV) python launch/report.py --run $(RUN_DIR)
	@echo "The report is $(RUN_DIR)/report/report.html, and the model, with its card, in $(RUN_DIR)/export/."
	@echo "MLflow's page: source .venv/bin/activate; mlflow ui --backend-store-uri sqlite:///$(dir $(RUN_DIR))mlflow.db"

test: compiler $(VENV)/.installed-test
	$(IN_VENV) python -m pytest $(THREE_AT_A_TIME) $(PYTEST_ARGS)

test-fast: $(VENV)/.installed-test
	$(IN_VENV) python -m pytest $(THREE_AT_A_TIME) -m "not slow" $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .
	$(IN_VENV) mypy

compiler:
	@command -v "$${CXX:-c++}" >/dev/null || { \
	echo "No C++ compiler: DeepSpeed compiles one op at its first start. Install g++ (build-essential) or set CXX." >&2; exit 1; }

# A stamp is written last, so what was cut off midway is done again, and what is whole is not.
$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed-%: $(VENV)/.made setup.cfg pyproject.toml constraints.txt
	$(BIN)/python -m pip install -c constraints.txt -e ".[$*]"
	touch $@

$(SHARDS)/.made: | $(VENV)/.installed-quickstart
	$(BIN)/python launch/make_shards.py --source mnist5k --out $(SHARDS)
	touch $@
