"""Benchmark tasks: one file each, found through `budgets.registry.TASKS`."""
