"""The papers' tables as lists of commands: python -m studies.zoph, python -m studies.reed."""
