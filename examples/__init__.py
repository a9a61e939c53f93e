"""Programs that show the pipeline at work."""
