"""The deployment of ``infra/compose.yaml``: configuration files, and what is done once before its processes start."""
