"""Commands that belong to no single module of the library."""
