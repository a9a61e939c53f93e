"""What runs when: schedules, order, retries, forms.  At parse time only Airflow and the standard library."""
