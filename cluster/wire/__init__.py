"""Protobuf on the wire: `headrace.proto`, the code generated from it, and conversions to records."""
