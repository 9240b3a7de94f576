"""Super-NaturalInstructions: its task files, split lists and ways of writing a prompt."""
