"""What is sent to Kubernetes."""
