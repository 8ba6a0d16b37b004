"""The commands: parse, build, run. scripts/ and the console commands call their `console`."""
