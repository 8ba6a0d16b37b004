"""The mathematics: frame, process, targets, weightings and samplers, of torch and numpy alone."""
