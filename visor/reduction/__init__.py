"""Efficiency methods: one file each, found through `budgets.registry.METHODS`.

A method is a frozen set of options that yields a schedule, and the rule that picks the tokens that stay.
`reduction.method` is a contract that all of `visor/` may import; a method's own file is asked for through the registry,
and knows `vision/`, `engine/` and `budgets/` only.
"""

from visor._lazy import handed_on

__all__ = ["Method", "tower_reduction"]
__getattr__ = handed_on(__name__, {"Method": "method", "tower_reduction": "method"})
