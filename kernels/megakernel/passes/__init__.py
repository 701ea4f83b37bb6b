"""The compiler's passes, one a file; `megakernel.pipeline` has their order."""
