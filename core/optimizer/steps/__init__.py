"""The ways to step: elementwise, stacked and whole-tensor rules, and any ``torch.optim`` class on whole tensors."""
