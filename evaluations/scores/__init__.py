"""The formulas, and the registry of what the evaluator can be asked for."""
