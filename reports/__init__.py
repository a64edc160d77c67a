"""Reports: a run folder becomes HTML, figures and tables.

The highest floor: it reads what `evaluations.records` has written and prices of `budgets/`, imports no torch and of
`visor/` only how an image is opened, and nothing imports it but the last step of a run. `python -m reports RUN_FOLDER`
makes a report anew.
"""

import budgets  # noqa: F401  refuses an old Python
