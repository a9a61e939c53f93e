"""What a production Airflow needs beside the DAGs: pools, and the order in which runs get them."""
