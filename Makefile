# Every target sets up what it needs in .venv; nothing outside this folder is touched. Needs git, make and Python 3.11+.
#
#   make example     the two shipped models, optimized and verified: out/janus/report.json, out/digits/report.json
#   make test        the tests, but for the slow ones (make test-slow)
#   make fuzz        250 random plans of 50 random decoders, held to loops by hand (docs/fuzz.md)
#   make test-oldest a part of them with the oldest torch and transformers that pyproject.toml allows, in .venv-oldest
#   make test-newest the same with the newest that pip finds, in .venv-newest
#   make lint        style, types, imports
#   make format      put the code into the style that `make lint` asks for
#   make arrows      which room imports which, in Graphviz's DOT; dashed: what would have to go to undo a circle

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
PIP_ARGS ?=# as --extra-index-url https://download.pytorch.org/whl/cpu, for a torch without CUDA
VENV ?= .venv
JOBS ?= 2

BIN := $(abspath $(VENV))/bin
READY := $(VENV)/.ready
TREE := build/tree
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup --durations=25

# One thread a process: the models of examples and tests are tiny, and JOBS processes run side by side.
OMP_NUM_THREADS ?= 1
export OMP_NUM_THREADS

# Capture, analyses, every policy against the oracle, calls, files, ONNX: what a version of PyTorch or transformers can break.
VERSIONS := tests/test_calls.py tests/test_static_axes.py tests/test_random_steps.py tests/test_semantics.py \
	tests/test_devices.py tests/store/test_round_trip.py tests/export/test_traps.py

.PHONY: help venv example test test-slow fuzz test-oldest test-newest lint style types imports arrows format tree clean

help:
	@sed -n 's/^#   //p' Makefile

venv: $(READY)

# Done anew when what is to be installed changes. A .venv whose interpreter is gone is made from scratch.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "tokgraph needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@"$(BIN)/python" -c '' 2>/dev/null || "$(PYTHON)" -m venv --clear "$(VENV)"
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

example: $(READY)
	$(BIN)/tokgraph optimize examples/janus.py --policy shared -o out/janus
	$(BIN)/tokgraph optimize examples/digits.py --policy shared -o out/digits

test: $(READY)
	$(PYTEST) -m "not slow"

# pytest exits with 5 when no test is marked slow.
test-slow: $(READY)
	$(PYTEST) -m slow || test $$? -eq 5

# Failures are shrunk to files that run alone.
fuzz: $(READY)
	$(BIN)/python benchmarks/fuzz.py --cases 50 --jobs $(JOBS) --out build/fuzz

# The other packages are those of constraints.txt, but for setuptools, whose newest versions older releases of torch rule out.
test-oldest: PINS = sed -n 's/.*"\(torch\|transformers\)>=\([0-9.]*\)[",].*/\1==\2/p' pyproject.toml | sort -u
test-newest: PINS = true
test-oldest test-newest: test-%:
	@test -n "$(PYTHON)" || { echo "tokgraph needs Python 3.11 or newer" >&2; exit 1; }
	@mkdir -p build
	@{ grep -v '^torch==\|^transformers==\|^setuptools==' constraints.txt; $(PINS); } >build/$*.txt
	@"$(PYTHON)" -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c build/$*.txt --upgrade \
		torch transformers -e '.[dev]'
	@.venv-$*/bin/python -c 'import torch, transformers; print("torch", torch.__version__, "transformers", transformers.__version__)'
	.venv-$*/bin/python -m pytest -n $(JOBS) --dist loadgroup -m "not slow" $(VERSIONS)

lint: style types imports

style: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY) tree
	cd $(TREE) && $(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache

imports: $(READY) tree
	cd $(TREE) && $(BIN)/lint-imports --no-logo --config $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/build/import_linter_cache

arrows: $(READY) tree
	@cd $(TREE) && for room in tokgraph tokgraph.passes; do \
		$(BIN)/import-linter drawgraph $$room --show-import-totals --show-cycle-breakers; done

# passes/ and cli/ are installed as tokgraph.passes and tokgraph.cli. mypy and import-linter read folders and not
# installations, so they get one in which everything lies where it is imported.
tree:
	@rm -rf $(TREE) && mkdir -p $(TREE)/tokgraph
	@ln -s $(CURDIR)/tokgraph/* $(CURDIR)/passes $(CURDIR)/cli $(TREE)/tokgraph/

clean:
	rm -rf .venv .venv-oldest .venv-newest build out .mypy_cache .ruff_cache .pytest_cache .hypothesis
