# make demo: teacher and student on the embedded world, some minutes on two cores.
# make test: formatting and the test suite. make test-slow: also the largest networks.
PYTHON ?= python3

demo: .venv/ready
	.venv/bin/python st.py --labeled 0.2 --aug s4 --out runs/demo
	.venv/bin/python -m tools.show run runs/demo

test: .venv/ready
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/python -m pytest -n 2

test-slow: .venv/ready
	.venv/bin/python -m pytest -n 2 -m slow

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet ".[test]"
	touch $@

.PHONY: demo test test-slow
