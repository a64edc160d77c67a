"""What a run may spend and what it costs: schedules, geometries, prices. Imports neither torch nor the other rooms."""
