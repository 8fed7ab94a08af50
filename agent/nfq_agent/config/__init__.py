"""The configuration: its models, the file that it is read from, and what can be wrong with it."""
