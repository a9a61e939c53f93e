"""Servers on one machine, for a laptop, the demo and the tests: Airflow, MLflow and Data Docs on loopback."""
