"""The front door: HTTP and gRPC in, placement, and the relay of tokens."""
