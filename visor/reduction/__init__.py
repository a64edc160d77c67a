"""Efficiency methods: one file each, found through `budgets.registry.METHODS`."""
