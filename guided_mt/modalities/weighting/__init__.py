"""What the terms of the loss weigh: over the timesteps, and against each other."""
