"""The paper's tables and figures, and the demo, from training to the last score."""
