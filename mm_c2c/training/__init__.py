"""The loop that trainings share, and their log."""
