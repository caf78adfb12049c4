"""What a step costs on a cluster, predicted."""
