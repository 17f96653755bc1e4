# Every target sets up what it needs. PYTHON is used once, to make the environment.
PYTHON ?= python3
DEMO_OUT ?= demo-out
BENCH_ARGS ?=
PYTEST_ARGS ?=
# Processes of the test suite; 1 runs it in one.
TEST_WORKERS ?= 2

BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo check format test test-slow browser-check docs bench bench-check bench-house bench-door bench-strangers headline bench-report package-check

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## make .venv with the package in editable form and all extras

# The stamp makes repeated calls quick. constraints.txt pins torch among others: without it pip takes the newest.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED)  ## train, compress and fine-tune a network on digits, in about a minute; files go to DEMO_OUT
	$(BIN)/spectrim demo --out $(DEMO_OUT)

check: $(INSTALLED)  ## lint, formatting, types and the layering rule
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(INSTALLED)  ## reformat the code and apply the safe fixes
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Compiled once, whatever the shell says of bytecode: rewriting the asserts takes 15 seconds, and so do programs that tests start.
test: export PYTHONDONTWRITEBYTECODE =
test: $(INSTALLED)  ## run the tests of the library, in TEST_WORKERS processes; PYTEST_ARGS adds arguments
	$(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist worksteal $(PYTEST_ARGS)

browser-check: $(INSTALLED) tests/browser/node_modules  ## open reports and built docs in Chromium (needs chromium and node)
	$(BIN)/python -m pytest -q tests/browser $(PYTEST_ARGS)

tests/browser/node_modules: tests/browser/package-lock.json
	npm ci --prefix tests/browser --no-audit --no-fund
	touch $@

test-slow: $(INSTALLED)  ## run what takes long: all mutated files, kills and stops of learned runs, further instruction sets
	$(BIN)/python -m pytest -q -m slow $(PYTEST_ARGS)

package-check: $(INSTALLED)  ## build the wheel and the source archive, look into them, install both in an empty environment
	$(BIN)/python -m benchmarks.package_check

docs: $(INSTALLED)  ## build the documentation into site/, warnings are errors, and run the tutorials and examples that make test leaves out
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	$(BIN)/python -m pytest -q -m slow -n $(TEST_WORKERS) tests/test_docs.py tests/test_examples.py

bench: $(INSTALLED)  ## run the benchmarks that have no result yet; BENCH_ARGS="--cifar10 DIR --weights FILE"
	$(BIN)/python -m benchmarks.run $(BENCH_ARGS)

bench-check: $(INSTALLED)  ## run the tests of the benchmarks, which train small networks; PYTEST_ARGS adds arguments
	$(BIN)/python -m pytest -q tests/benchmarks $(PYTEST_ARGS)

bench-house: $(INSTALLED)  ## measure the structure, the start and the suite; house_golden compares a change of structure
	$(BIN)/python -m benchmarks.run house house_suite --force

bench-door: $(INSTALLED)  ## measure what a stranger sees first: claims D1 to D6 without a result; BENCH_ARGS="D3 --force"
	$(BIN)/python -m benchmarks.door $(BENCH_ARGS)

bench-strangers: $(INSTALLED)  ## measure what strangers' networks come to: claims N1 to N6 without a result; BENCH_ARGS="N4 --force"
	$(BIN)/python -m benchmarks.strangers $(BENCH_ARGS)

headline: $(INSTALLED)  ## compress real networks by every arm, ours and others'; BENCH_ARGS="--path cifar10=DIR --networks resnet20"
	$(BIN)/python -m benchmarks.headline $(BENCH_ARGS)

bench-report: $(INSTALLED)  ## write tables and figures from benchmarks/results into README.md and docs/
	$(BIN)/python -m benchmarks.report $(BENCH_ARGS)
