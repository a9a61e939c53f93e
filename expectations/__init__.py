"""Great Expectations suites, one per table, and the audit that runs them on staged files."""
