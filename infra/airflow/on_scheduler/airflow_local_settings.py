"""Airflow imports this module by its name from the scheduler's ``PYTHONPATH``; it takes over every name it finds.

An Airflow that has such a module of its own imports the hook there instead:
``from infra.airflow.priority import task_instance_mutation_hook``.
"""

from infra.airflow.priority import task_instance_mutation_hook

__all__ = ["task_instance_mutation_hook"]
