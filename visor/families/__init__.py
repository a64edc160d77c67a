"""Model families: one adapter file each, found through `budgets.registry.FAMILIES`.

An adapter says where a Hugging Face model has its tower, projector and decoder, and how images become tokens.
`families.base` is a contract that all of `visor/` may import; a family's own file is asked for through the registry,
and knows `vision/`, `engine/` and `budgets/` only.
"""

from visor._lazy import handed_on

__all__ = ["FamilyAdapter", "adapter_for"]
__getattr__ = handed_on(__name__, {"FamilyAdapter": "base", "adapter_for": "base"})
