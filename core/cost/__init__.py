"""What a step costs in each tensor-parallel mode, and the mode that is predicted to be the cheapest."""
