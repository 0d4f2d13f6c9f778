# make audit and make test work in a bare clone: each makes .venv and installs what it needs, as pinned in constraints.txt.
PYTHON ?= python3
PIN = .venv/bin/python -m pip install -qq -c constraints.txt --build-constraint constraints.txt

.PHONY: audit test lower lint docs bench clean
.DELETE_ON_ERROR:

# MODEL: a hub name or folder, by default the bundled model; TEXT: a file or folder; OUT: the folder it writes.
OUT ?= audit
audit: .venv/.runtime
	@.venv/bin/python -m unwrite audit $${MODEL:+"$$MODEL"} $${TEXT:+--text "$$TEXT"} --out "$(OUT)"

test: .venv/.test .venv-legacy/.done
	@.venv/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal

# A few tests that reach every dependency, with the oldest version of each that pyproject.toml allows.
OLDEST = tests/test_families.py tests/test_result.py tests/test_report.py tests/test_gguf.py tests/test_images.py
lower: .venv-lower/.done
	@.venv-lower/bin/python -m pytest -q -W default $(OLDEST)

lint: .venv/.lint
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyright

# The pages, the tutorials run anew, in docs/_build/html; a warning is an error, and nothing needs the network.
docs: .venv/.docs
	@.venv/bin/python -m sphinx -q -W --keep-going -n -E -b html -d docs/_build/doctrees docs docs/_build/html
	@echo "docs/_build/html/index.html"

# Each file in benchmarks/ is a script that prints one table.
bench: .venv/.runtime
	@set -e; for script in benchmarks/*.py; do .venv/bin/python "$$script"; done

# Results in audit/ are yours and stay.
clean:
	rm -rf .venv .venv-legacy .venv-lower dist docs/_build .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps below are touched when an installation is complete, so that it is done once.
.venv/.pip: constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("unwrite needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	@$(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install -qq -c constraints.txt --upgrade pip
	@touch $@

.venv/.runtime: .venv/.pip pyproject.toml
	@echo "Installing unwrite into .venv; the first time this takes a minute or two"
	@$(PIN) -e .
	@touch $@

.venv/.test: .venv/.runtime
	@$(PIN) --group test --group oracle
	@touch $@

.venv-lower/.done: .venv/.pip pyproject.toml tests/lower.py
	@rm -rf .venv-lower
	@.venv/bin/python -m venv .venv-lower
	@.venv-lower/bin/python -m pip install -qq -c constraints.txt --upgrade pip
	@.venv/bin/python tests/lower.py > .venv-lower/oldest.txt
	@.venv-lower/bin/python -m pip install -qq -c .venv-lower/oldest.txt --build-constraint constraints.txt \
		-e ".[accelerate,datasets,gguf]" pytest hypothesis beartype
	@touch $@

.venv/.lint: .venv/.runtime
	@$(PIN) --group lint
	@touch $@

.venv/.docs: .venv/.runtime
	@$(PIN) --group docs
	@touch $@

# An older TransformerLens beside the one in .venv: what is not in this environment is found beneath it, as pinned.
.venv-legacy/.done: .venv/.test
	@rm -rf .venv-legacy
	@.venv/bin/python -m venv --without-pip .venv-legacy
	@.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		"$$(.venv-legacy/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beneath.pth"
	@.venv-legacy/bin/python -m pip install -qq --group legacy-oracle
	@touch $@
