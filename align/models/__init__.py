"""One base in memory, and roles that are views over it."""
