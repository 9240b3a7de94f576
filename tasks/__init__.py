"""SeqIO registrations, one module per benchmark; importing a module registers its tasks."""
