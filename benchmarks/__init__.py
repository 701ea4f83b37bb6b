"""A package in name, so that no other distribution's `benchmarks` is taken for it."""
