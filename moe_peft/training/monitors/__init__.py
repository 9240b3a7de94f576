"""What a run watches besides its loss."""
