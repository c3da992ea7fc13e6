# Every target sets itself up in .venv, from a clean clone on; what is done already is not done again.
#
#   make demo     segment a photograph with SAM and Stable-SAM, from good and from sloppy boxes
#   make test     style, types, all tests, and every benchmark once at tiny sizes
#   make lint     style and types
#   make bench    measure throughput by pytest-benchmark, each contestant verified first; on a GPU by bench/on_gpu.sh
#   make bench-quick   every benchmark verified and called once at tiny sizes; measures nothing
#   make performance   write docs/performance.md anew from the records that are there; measures nothing
#   make compile-matrix   compile every kernel in every plan for six GPU architectures, by torch 2.11 and the newest
#   make results DATA=dir   train and evaluate every row of docs/results.md that has no record yet, and write it anew
#   make clean    remove what was built; the environment stays
#   make distclean  remove the environment, too
#
# PYTHON=python3.12 chooses the interpreter of a new environment, VENV=dir its place;
# BENCH_OPTIONS="--compile --peak-memory" goes to the benchmarks on a CPU.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip

# torch is among the build requirements, and it is large: installed first, once, and built against in place
# (--no-build-isolation) instead of a second time in a build environment.
BUILD_REQUIREMENTS := $(shell sed -n 's/^requires = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ',')
CPU_RECORD = bench/results/cpu/$(shell date +%F)-$(shell git describe --always --exclude='*' --abbrev=10).json
COMPILED_SOURCES := $(shell find csrc -type f)
BUILD_TOOLS := $(wildcard build_tools/*.py)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Python compiles what it imports, when it imports it; pip would compile all of it, on one core.
export PIP_NO_COMPILE := 1

.PHONY: demo test lint bench bench-quick performance compile-matrix results clean distclean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	@echo "==> one box, from the command line"
	$(BIN)/stable-sam segment examples/chelsea.png --box 8 0 405 299 --out demo_output
	@echo "==> three photographs, each from many sloppy boxes"
	$(BIN)/python examples/demo.py --out demo_output

test: lint
	@echo "==> tests"
	$(BIN)/python -m pytest -n 2 --dist loadfile
	$(MAKE) bench-quick

lint: $(VENV)/.installed-dev
	@echo "==> style and types"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(filter %.h %.cuh %.cpp %.cu,$(COMPILED_SOURCES))
	$(BIN)/mypy

bench: $(VENV)/.installed-dev
	@if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; \
	then status=0; for call in "" --second; do PYTHON=$(BIN)/python bench/on_gpu.sh $$call || status=1; done; \
	exit $$status; \
	else mkdir -p bench/results/cpu && \
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-json=$(CPU_RECORD) $(BENCH_OPTIONS) && \
	echo "==> $(CPU_RECORD)"; fi

bench-quick: $(VENV)/.installed-dev
	@echo "==> benchmarks, once and untimed"
	$(BIN)/python -m pytest bench --quick --benchmark-disable -q -n 2 --dist loadfile

performance: $(VENV)/.installed-dev
	$(BIN)/python bench/performance_page.py

compile-matrix: $(VENV)/.installed-dev
	$(BIN)/python bench/compile_matrix.py

results: $(VENV)/.installed-dev
	@test -n "$(DATA)" || { echo "DATA: expected a folder of pictures with masks (docs/data.md), got none"; exit 2; }
	$(PIP) install --quiet "stable_sam_cuda[study]"
	$(BIN)/python study/run.py --data $(DATA)
	$(BIN)/python study/report.py

$(VENV)/.created:
	@echo "==> environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.build-requirements: $(VENV)/.created pyproject.toml
	@echo "==> torch and what the build needs (several GB, once)"
	$(PIP) install $(BUILD_REQUIREMENTS) torchvision
	@touch $@

$(VENV)/.installed: $(VENV)/.build-requirements setup.py pyproject.toml $(BUILD_TOOLS) $(COMPILED_SOURCES)
	@echo "==> the package, its compiled operations included"
	$(PIP) install --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "==> what the tests need"
	$(PIP) install "stable_sam_cuda[dev]"
	@touch $@

clean:
	rm -rf build dist demo_output *.egg-info .pytest_cache .ruff_cache .mypy_cache
	rm -f stable_sam_cuda/*.so stable_sam_cuda/_build_record.json $(VENV)/.installed $(VENV)/.installed-dev

distclean: clean
	rm -rf $(VENV)
