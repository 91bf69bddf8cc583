"""A recipe's memory and time before it is paid for: what a stage's phases will hold, on this machine or another."""
