# `make demo` and `make test` do everything, the installation included. `make help` lists the rest.

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
# Two processes of a core each; a file's tests stay together, since they share what they trained. In the order of
# their names: xdist's own order, most tests first, leaves files with few and long tests to the end and to one process.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder
DEMO := work_dirs/demo
DEMO_CONFIG := configs/demo/faster_rcnn_cbam.py

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all stacks lint docs docs-serve docs-pages lock clean

help:
	@echo 'make demo      install what is missing, train a small Faster R-CNN with CBAM on built-in data, evaluate, report'
	@echo 'make test      install what is missing, run the tests (make test-all: the slow ones too)'
	@echo 'make setup     install only, into $(VENV)'
	@echo 'make stacks    run the tests with the versions that people have, each in an environment in build/stacks'
	@echo 'make lint      check the style with ruff, and the types of ops, models and engine with mypy'
	@echo 'make docs      build the pages of docs/ into site/ (make docs-serve: show them in a browser)'
	@echo 'make lock      write constraints.txt anew, with the newest versions that fit'
	@echo 'make clean     remove $(VENV) and what demo and tests wrote'

setup: $(READY)

KERNELS := cbam_mmdet/ops/cpu_kernels.c cbam_mmdet/ops/cpu_kernels.h
$(READY): setup.py constraints.txt overrides.txt tools/setup_env.sh $(KERNELS)
	@bash tools/setup_env.sh $(VENV)
	@touch $@

demo: $(READY)
	$(PY) tools/make_shapes.py data/shapes
	$(PY) tools/train.py $(DEMO_CONFIG) --work-dir $(DEMO)
	$(PY) tools/test.py $(DEMO_CONFIG) $(DEMO) --work-dir $(DEMO) --out $(DEMO)/results.pkl
	$(PY) tools/draw_run.py $(DEMO)
	$(PY) tools/report.py $(DEMO)

test: $(READY)
	$(PYTEST)

test-all: $(READY)
	$(PYTEST) -m ''

stacks: $(READY)
	$(PY) .ci/stacks/run.py

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# The site's pages are docs/, and the files of the repository that they link to. There a link needs no ../.
PAGES := build/pages
docs-pages:
	rm -rf $(PAGES)
	mkdir -p $(PAGES)/benchmarks
	cp -R docs/. CHANGELOG.md CONTRIBUTING.md $(PAGES)
	cp -R benchmarks/results $(PAGES)/benchmarks
	sed -i.bak -e 's|](\.\./|](|g' -e 's|]: \.\./|]: |g' -e 's|](docs/|](|g' $(PAGES)/*.md
	rm $(PAGES)/*.bak

docs: $(READY) docs-pages
	$(VENV)/bin/zensical build --strict --clean

# After a change of a page, `make docs-pages` in another terminal: the browser then shows it.
docs-serve: $(READY) docs-pages
	$(VENV)/bin/zensical serve

lock: $(READY)
	@bash tools/setup_env.sh $(VENV) --lock

clean:
	rm -rf cbam_mmdet/ops/_cpu_kernels* $(VENV) data/shapes $(DEMO) $(PAGES) build/stacks site .cache .pytest_cache .ruff_cache .mypy_cache
