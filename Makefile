PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test types docs test-all test-oldest clean

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev,demo,docs,onnx,interop,hf,open_clip]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 --dist worksteal

# users' code that calls every public name, and the stub of the package, under the strictest rules
types: $(STAMP)
	$(BIN)/mypy --strict tokenzoo/__init__.pyi tests/typed_api.py

# the site in build/site, with token maps drawn by the demo's model; warnings are errors, nothing is fetched
docs: $(STAMP)
	$(BIN)/python scripts/gallery.py --output build/gallery
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# every case of every test
test-all: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 --dist worksteal --full

# the oldest timm and transformers that are supported, in front of those of the environment: models under every method
OLDEST := .oldest
$(OLDEST)/.installed: $(STAMP)
	rm -rf $(OLDEST)
	$(BIN)/python -m pip install --quiet --no-deps --target $(OLDEST) "timm==1.0.19" "transformers==5.18.0"
	touch $@

test-oldest: $(OLDEST)/.installed
	PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest -n 2 --dist worksteal -k "not lower_precision" tests/test_matrix.py \
		tests/test_cait.py tests/test_xcit.py tests/test_hf_same_weights.py tests/test_hf_matrix.py

clean:
	rm -rf $(VENV) $(OLDEST) demo_out build *.egg-info
