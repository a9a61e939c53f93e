"""Sources: how raw logs become the rows of the input contract."""
