"""Model families: one adapter file each, found through `budgets.registry.FAMILIES`."""
