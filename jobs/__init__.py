"""Spark jobs: one module per table, each a pure ``DataFrame -> DataFrame`` rule and a thin main."""
