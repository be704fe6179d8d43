# `make demo` and `make test` set themselves up: a virtual environment in .venv, installed through constraints.txt.

PYTHON ?= python3
JOBS ?= 2
NAME ?= steps layers shares factor-steps switch held peak truncation captures startup scale shared sites onnx
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo docs test test-gpu fuzz zoo torture bench bench-gpu lint wheel clean

$(INSTALLED): constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(INSTALLED)          ## the main job on real data: plan, train, truncate, export, compare, draw
	$(BIN)/python samples/demo.py demo

# One thread each, so that JOBS of them do not fight over the cores; byte code is kept, which every process that a test
# starts would make again; and neighbours stay in one process, so that what they share is made once.
TESTED := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

test: $(INSTALLED)          ## the everyday tests
	$(TESTED)

test-gpu: $(INSTALLED)      ## what needs a CUDA device
	$(BIN)/python -m pytest -q -m 'gpu and not fuzz' tests

fuzz: $(INSTALLED)          ## the contracts on thousands of random models (FUZZ_EXAMPLES=2000 for each), and all of their grid
	$(TESTED) -m 'fuzz and not gpu'

zoo: $(INSTALLED)           ## real architectures through the library: tests/zoo/RESULTS.md; goes on where it stopped
	OMP_NUM_THREADS=1 $(BIN)/python tests/zoo/run.py

torture: $(INSTALLED)       ## kills and flipped bits, an hour of them: tests/torture/RESULTS.md; goes on where it stopped
	OMP_NUM_THREADS=1 $(BIN)/python tests/torture/run.py

bench: $(INSTALLED)         ## the figures of the documents, measured here: all that take minutes, or NAME="steps switch"
	$(BIN)/python benchmarks/run.py $(NAME)

bench-gpu: $(INSTALLED)     ## what only a GPU can say, in under ten minutes; then also make bench NAME="large onnx stacked stack-steps"
	$(BIN)/python benchmarks/gpu.py --out gpu.jsonl

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(INSTALLED)          ## the pages, into site/; a warning, such as of a broken link, fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

wheel: $(INSTALLED)
	$(BIN)/python -m build --wheel

clean:
	rm -rf .venv build dist demo site *.egg-info
