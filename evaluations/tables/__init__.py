"""Tables and figures of scores."""
