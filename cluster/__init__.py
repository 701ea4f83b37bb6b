"""The contract every process of a cluster shares, and its control plane.

Imports nothing else of this project, and never torch: a router holds no tensor.
"""
