"""A run and the machine: who started it, who else is of it, what it is asked from outside, and where it alone writes."""
