PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two processes, a file of tests in one of them, so that its runs are made once; in the order of
# tests/conftest.py, where xdist's own would leave the file of the twenty kills for the end.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder --durations 40 --durations-min 3
REQUIREMENTS := pyproject.toml constraints.txt

.PHONY: demo test test-all lint clean

demo: $(VENV)/.installed-cpu
	$(BIN)/vggrepro train

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PARALLEL)

# Every test, the slow ones too, with ten times the random examples.
test-all: $(VENV)/.installed-test
	HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest $(PARALLEL) -m "slow or not slow"

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# A stamp is newer than what it was installed from, so nothing is installed twice.
$(VENV)/.installed-cpu: $(REQUIREMENTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[cpu]"
	touch $@

$(VENV)/.installed-test: $(REQUIREMENTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[cpu,test]"
	touch $@ $(VENV)/.installed-cpu

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
