"""lmms-eval both ways: its benchmarks run by our engine (`tasks`), and our models in its harness (`model`).

lmms-eval is imported inside functions alone: everything else of the project works without it.
"""
