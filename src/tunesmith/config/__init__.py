"""Package that reads a recipe file and its overrides into one frozen `Run`.

It does not import torch.
"""
