"""The harness: suites, tasks, sweeps, measurements, records.

`run`, `speed`, `overhead` and `bench` are commands; `job`, `speed_job` and `overhead_job` are what they start. It knows
`budgets/` and the rooms of `visor/` below it, and `reports/` only as the last step of a run. `reports/` may import it.
"""

import budgets  # noqa: F401  refuses an old Python
