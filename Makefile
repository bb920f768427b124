# Every target makes what it needs in .venv, a virtual environment of its own, and installs only what has changed.
#
#   make demo        serve the demo model from two expert-parallel ranks under Ray, and ask it questions
#   make test        the tests that a change needs before it is shown: representatives of everything, in a few minutes
#   make test-slow   the tests that `make test` leaves out: compilations, matrices (docs/testing.md)
#   make test-full   all tests, with exhaustive matrices that take hours
#   make test-random   the randomised tests, with new examples and many more of them
#   make check-model NAME=gpt_oss   a family of models against transformers
#   make lint        style: ruff, and ruff's format
#   make types       mypy; it also builds the tree of links in which editors find the modules
#   make kernels-report   what the compiler makes of every GPU kernel; needs no GPU
#   make proto       regenerate the gRPC code after a change of the .proto
#
# PYTHON chooses the interpreter; PIP_ARGS is passed to pip, for instance on a Linux machine without a GPU, to save 3 GB:
#   make demo PIP_ARGS="--index-url https://download.pytorch.org/whl/cpu --extra-index-url https://pypi.org/simple"

NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11; do \
  $$name $(NEW_ENOUGH) 2>/dev/null && echo $$name && break; done)
PIP_ARGS ?=
BIN := .venv/bin
INSTALLED := .venv/installed
INSTALLED_DEV := .venv/installed-dev
# With the method "thread" a test that hangs in native code or in its clean-up ends its process and is reported. The run then ends:
# pytest-xdist would run that test again, and waits for ever for the tests that its process had completed.
# Bytecode is kept, whatever the environment says: tests start hundreds of interpreters that import the same modules.
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -q -n 2 --max-worker-restart=0 --timeout-method=thread
PROTO := deploy/proto
# The oldest tools whose code the oldest grpcio and protobuf of pyproject.toml can run.
PROTO_TOOLS := grpcio-tools==1.73.1

.PHONY: demo test test-slow test-full test-random check-model lint types kernels-report proto clean

demo: $(INSTALLED)
	$(BIN)/expertwire demo

test: $(INSTALLED_DEV)
	$(PYTEST) -m "not slow and not full"

test-slow: $(INSTALLED_DEV)
	$(PYTEST) -m "slow and not full" --new-interpreters

test-full: $(INSTALLED_DEV)
	$(PYTEST) --new-interpreters

test-random: $(INSTALLED_DEV)
	$(PYTEST) -m "hypothesis" --hypothesis-profile=random --timeout=3600

check-model: $(INSTALLED_DEV)
	$(BIN)/python -m pytest -q tests/engine/test_architectures.py tests/deploy/test_inspect.py -k "$(NAME)"

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED_DEV)
	$(BIN)/python tools/link_tree.py
	$(BIN)/mypy

kernels-report: $(INSTALLED)
	$(BIN)/python -m expertwire.bench.kernels.report

.venv/bin/pip:
	@"$(PYTHON)" $(NEW_ENOUGH) 2>/dev/null || \
	  { echo "error: Expertwire needs Python 3.11 or later; name it with: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	"$(PYTHON)" -m venv .venv

# torch first: it decides which of its builds fits this machine.
.venv/torch: .venv/bin/pip
	$(BIN)/python -m pip install $(PIP_ARGS) "torch>=2.11,<2.14"
	@touch $@

$(INSTALLED): .venv/torch pyproject.toml
	$(BIN)/python -m pip install $(PIP_ARGS) -e .
	@touch $@

$(INSTALLED_DEV): .venv/torch pyproject.toml
	$(BIN)/python -m pip install $(PIP_ARGS) -e ".[dev]"
	@touch $(INSTALLED) $@

# In an environment of its own: new tools make code that older versions of grpcio refuse.
proto:
	tools=$$(mktemp -d) && trap 'rm -rf "$$tools"' EXIT && "$(PYTHON)" -m venv "$$tools/venv" && \
	"$$tools/venv/bin/python" -m pip install -q $(PIP_ARGS) "$(PROTO_TOOLS)" && \
	"$$tools/venv/bin/python" -m grpc_tools.protoc -I expertwire/$(PROTO)=$(PROTO) --python_out="$$tools" --pyi_out="$$tools" \
	  --grpc_python_out="$$tools" expertwire/$(PROTO)/expertwire_v1.proto && cp "$$tools"/expertwire/$(PROTO)/*_pb2* $(PROTO)

clean:
	rm -rf .venv
