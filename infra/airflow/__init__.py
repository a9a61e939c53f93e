"""What any Airflow needs beside the DAGs: pools, the order in which runs get them, and who asks it how it is."""
