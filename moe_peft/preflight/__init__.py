"""What a run needs, before it runs: parameters, memory, operations, on hardware that is not here."""
