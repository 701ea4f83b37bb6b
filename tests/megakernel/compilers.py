"""Marks tests that compile C++."""

import pytest

from megakernel.build import BuildError, find_compiler

try:
    find_compiler()
    HAS_COMPILER = True
except BuildError:
    HAS_COMPILER = False
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
