"""VISOR: vision-language models that keep every visual token and make the interaction sparse.

Importing this package is cheap; torch and transformers are imported by the modules that need them. It makes VISOR
models known to transformers' Auto classes.
"""

import budgets  # noqa: F401  refuses an old Python
from visor.model.registration import register

register()
