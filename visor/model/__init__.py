"""The VISOR model as transformers has models: config, forward and generate, router, conversion from a base.

`VisorConfig`, `VisorForConditionalGeneration` and `convert(base_model)` are what others need; `registration` lets
transformers' Auto classes find the first two. `inference/` and everything above it may import it.
"""

from visor._lazy import handed_on

__all__ = ["VisorConfig", "VisorForConditionalGeneration", "convert"]
__getattr__ = handed_on(
    __name__, {"VisorConfig": "configuration", "VisorForConditionalGeneration": "modeling", "convert": "conversion"}
)
