"""Where requests go: the pure choice, and the store of what it is chosen from."""
