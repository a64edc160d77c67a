"""The harness: suites, tasks, sweeps, measurements, records."""
