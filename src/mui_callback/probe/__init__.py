"""The held-out probe set: what it contains, how it is read, and how it becomes tokens."""
