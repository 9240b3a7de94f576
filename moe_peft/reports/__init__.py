"""Tables and pictures of what runs left behind."""
