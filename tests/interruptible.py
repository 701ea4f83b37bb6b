"""A `headrace` command that heeds Ctrl-C, wherever the tests themselves were started."""

import sys

_RUN = (
    "import runpy, signal;"
    "signal.signal(signal.SIGINT, signal.default_int_handler);"
    "runpy.run_module('headrace', run_name='__main__', alter_sys=True)"
)

INTERRUPTIBLE = (sys.executable, "-c", _RUN)
"""What a shell runs in the background, and its children, ignore SIGINT. The command undoes that itself: a
`preexec_fn` would run Python between fork and exec, where gRPC's threads hold locks, and crashes at times."""
