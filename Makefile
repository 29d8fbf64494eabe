# Every target sets up what it needs; a finished set-up takes no time.
PYTHON := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup images demo test check lab figures site reproduce-small soak browser-test doctor bench lint standin clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 18

setup:  ## .venv with the locked packages and this one
	@sh ci/setup.sh

images: setup  # of the tests
	@sh ci/setup.sh fashion-mnist

demo:  ## the whole method on real images, in colour (6 minutes)
	@sh ci/setup.sh cifar-10 fashion-mnist
	@$(PYTHON) -m igd_lib demo

test: lint images  ## lint, pytest, every notebook at scale "smoke", two at "rehearsal" (10 to 15 minutes)
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n auto --dist worksteal
	@$(PYTHON) ci/smoke_notebooks.py --twice 00
	@$(PYTHON) ci/smoke_notebooks.py --scale rehearsal --only 02 08

check: images soak  ## what takes longer: slow tests, Ray, every notebook twice in one kernel and rehearsed, ten kills (about 40 minutes)
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n auto -m "slow and not weights"
	@$(PYTHON) ci/smoke_notebooks.py --twice all
	@$(PYTHON) ci/smoke_notebooks.py --scale rehearsal

lint: setup  ## ruff, types, storeys
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy
	@.venv/bin/lint-imports --no-logo

lab: setup  ## the notebooks in JupyterLab
	@$(PYTHON) -m jupyter lab notebooks

figures: setup  ## figures, tables and the texts' numbers from the saved results in paper_figures/data
	@$(PYTHON) paper_figures/make_figures.py
	@$(PYTHON) paper_figures/make_texts.py

site: setup  ## the site, with what the notebooks showed, into docs/_build/html
	@$(PYTHON) docs/make_site.py

reproduce-small: setup  ## every notebook at scale "small", then figures, tables and pages (hours; goes on where it was stopped)
	@$(PYTHON) -m ci.reproduce_small

soak: setup  ## a 200-image run killed at ten random moments, and what is left of it
	@OMP_NUM_THREADS=1 IGD_SOAK=1 $(PYTHON) -m pytest -q ci/tests/test_distill.py -k killed_at_random

browser-test: site  ## four notebooks in JupyterLab and three pages of the site in headless Chromium (needs chromium)
	@$(PYTHON) ci/browser_test.py

doctor: setup  ## what is on this machine: versions, memory, data, models, and what each notebook would do
	@$(PYTHON) -m igd_lib doctor

bench: setup  ## what guided sampling costs on this machine: seconds, arithmetic, memory
	@$(PYTHON) -m ci.bench.bench

standin: setup  ## train the Fashion-MNIST stand-in again (about an hour), into out/standin
	@$(PYTHON) -m igd_lib standin fashion-mnist --out out/standin

clean:  ## remove .venv and out
	@rm -rf .venv out
