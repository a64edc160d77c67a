"""What a run may spend and what it costs: schedules, geometries, prices, and the registries of what can be named.

The lowest floor: everything may import it; it imports no other room, and torch nowhere. A method it knows in
annotations only (`visor.reduction.method`), and the registries find methods, families and tasks by name.
"""
