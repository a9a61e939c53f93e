-- The three databases, made once in an empty server; what is in them is made by `onetrans upgrade` and on first use.
CREATE DATABASE airflow;
CREATE DATABASE mlflow;
CREATE DATABASE lake;
