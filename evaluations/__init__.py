"""The harness: suites, tasks, sweeps, measurements, records."""

import budgets  # noqa: F401  refuses an old Python
