"""Matrix mathematics: tensors in, tensors out; torch and the standard library only.

All functions take a leading axis of groups, compute in float64, and take the eigenproblem on the smaller side.
"""
