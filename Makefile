# make demo: from nothing to a score.  make check: lint, format and the fast tests, in a minute.  make test: every test.
# make torture: damaged and hostile files, servers and clients, MINUTES of each kind; SEED=1 tries others.
# Each makes .venv first, once, by uv where it is there, else by pip. The demo needs fewer packages than the tests.
# The tests run in two processes, whose threads do not wait for each other's cores.
PYTHON ?= python3
VENV ?= .venv
FOR_RUNS := $(VENV)/installed
FOR_TESTS := $(VENV)/installed-for-tests
UV := $(shell command -v uv)

ifdef UV
INSTALL = $(UV) pip install --python $(VENV)/bin/python --require-hashes
else
INSTALL = $(VENV)/bin/python -m pip install --disable-pip-version-check --require-hashes
endif

PYTEST = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(VENV)/bin/python -m pytest -n 2 --dist worksteal

MINUTES ?= 1
SEED ?= 0

.PHONY: demo check lint test format audit torture

demo: $(FOR_RUNS)
	$(VENV)/bin/python -m retrieval.datasets sample --out data/sample
	$(VENV)/bin/python model_not_tuned.py --query_dir data/sample/test/query \
		--gallery_dir data/sample/test/gallery --custom_dataset --output_dir results/sample

lint: $(FOR_TESTS)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

check: lint
	$(PYTEST) -m "not slow"

test: lint
	$(PYTEST)

torture: $(FOR_TESTS)
	failed=0; for campaign in images weights archives cache network server runs; do \
		TQDM_DISABLE=1 $(VENV)/bin/python -m tests.torture.$$campaign --seed $(SEED) --minutes $(MINUTES) || failed=1; done; exit $$failed

format: $(FOR_TESTS)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# Known vulnerabilities of the packages.
audit: $(FOR_TESTS)
	$(PYTHON) -m venv $(VENV)/audit && $(VENV)/audit/bin/python -m pip install -q --disable-pip-version-check pip-audit
	@$(VENV)/audit/bin/pip-audit --progress-spinner off --disable-pip --require-hashes -r tests/requirements.lock \
		> $(VENV)/audit/found; status=$$?; grep -v "could not be audited" $(VENV)/audit/found; \
		echo "$$(grep -c 'could not be audited' $(VENV)/audit/found) packages could not be audited"; \
		exit $$status

$(FOR_RUNS): requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 14) or \
		sys.exit("Python %d.%d is not supported: make PYTHON=python3.12 takes another one (3.11 to 3.14)" % v)'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -r requirements.lock
	@touch $@

$(FOR_TESTS): tests/requirements.lock $(FOR_RUNS)
	$(INSTALL) -r tests/requirements.lock
	@touch $@
