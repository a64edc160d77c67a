"""Reports: a run folder becomes HTML, figures and tables. Imports neither torch nor visor."""

import budgets  # noqa: F401  refuses an old Python
