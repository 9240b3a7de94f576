"""Settings: gin files, what is checked before they run, the names they agree on."""
