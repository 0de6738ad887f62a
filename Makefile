# Every target works in a fresh clone: .venv is made on first use, and needs nothing but Python 3.11+ and pip's package index.
#   make demo ARGS="--wing torch"      make test ARGS="-k l1"      make test PYTHON=/opt/python3.12/bin/python
# The scripts of the demo get the same ARGS; --lam, --members and --penalty, which not all of them know, go to them directly.

# The pinned torch is packaged for every one of these, but not every index carries every build: 3.11 is the one tested.
PYTHONS = python3.11 python3.12 python3.13 python3.14 python3
PYTHON ?=
ARGS ?=

VENV = .venv
READY = $(VENV)/.ready
RUN = $(VENV)/bin/python

# Someone else's modules must not shadow those of .venv.
unexport PYTHONPATH PYTHONHOME

.PHONY: help demo test test-all lint bench clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' $(firstword $(MAKEFILE_LIST)) | awk -F': ' '{ printf "  make %-9s %s\n", $$1, $$2 }'

demo: $(READY) ## exact zeros on real digits, a path of strengths, a verdict that both frameworks agree (two minutes)
	$(RUN) examples/sparse_digits.py $(ARGS)
	$(RUN) examples/regularization_path.py $(ARGS)
	$(RUN) examples/digits_parity.py $(ARGS)

test: $(READY) ## the tests but the slow ones, in two processes of one thread each (about eight minutes)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -m "not slow" $(ARGS)

test-all: $(READY) ## all tests: whole corpora, long examples, compilers as well
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 $(ARGS)

lint: $(READY) ## ruff (rules and format), pyright on the public surface
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(RUN) -m pyright

bench: $(READY) ## time of a training step against the alternatives, as ratios
	$(RUN) benchmarks/train_step.py $(ARGS)

clean: ## remove .venv and the tools' caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A finished .venv is brought up to date in place; anything else is made anew, and a failure or Ctrl-C removes it.
$(READY): pyproject.toml constraints.txt
	@set -eu; \
	for python in $(or $(PYTHON),$(PYTHONS)); do \
	    if "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then break; fi; \
	    python=; \
	done; \
	if [ -z "$$python" ]; then \
	    echo 'make: no Python >= 3.11 with venv and ensurepip among: $(or $(PYTHON),$(PYTHONS))' >&2; \
	    echo '      Install one (Debian, Ubuntu: python3 and python3-venv), or name it: make PYTHON=/path/to/python' >&2; \
	    exit 1; \
	fi; \
	trap 'status=$$?; if [ $$status -ne 0 ]; then rm -rf $(VENV); echo "make: no $(VENV) was left behind; see above for the reason" >&2; fi' EXIT; \
	trap 'exit 130' INT TERM; \
	if [ -e $@ ]; then \
	    echo "== $(VENV): pyproject.toml or constraints.txt changed, bringing it up to date"; \
	    rm $@; \
	else \
	    echo "== $(VENV): making it with $$python ($$("$$python" --version)); one to three minutes"; \
	    rm -rf $(VENV); \
	    "$$python" -m venv $(VENV); \
	fi; \
	$(RUN) -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'; \
	touch $@; \
	echo "== $(VENV): ready"
