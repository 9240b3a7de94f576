"""What every long-running process needs: files, locks, signals, processes, progress, memory."""
