"""What a run needs, before it runs: parameters, memory, operations, on absent hardware too."""
