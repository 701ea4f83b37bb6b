"""The compiler and runtime of the Ada MegaKernel, and the model formats it reads."""
