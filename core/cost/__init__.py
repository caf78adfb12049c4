"""The predicted cost of a step in each tensor-parallel mode, and the mode that is predicted to be the cheapest."""
