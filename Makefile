# make demo: teacher and student on the embedded world, a few minutes on two cores. make test: the test suite.
PYTHON ?= python3

demo: .venv/ready
	.venv/bin/python st.py --labeled 0.2 --aug s4 --out runs/demo

test: .venv/ready
	.venv/bin/python -m pytest

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet ".[test]"
	touch $@

.PHONY: demo test
