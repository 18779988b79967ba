"""Pictures, checks, prediction, export, data sets, speed: run them as python -m tools.NAME."""
