"""How the parts of the pipeline are started."""
