"""What the CUDA kernels' headers and the compiler must agree on; generated sources assert that they do."""

NUM_CONSUMER_WARPS = 8
"""`kConsumerWarps` of machine.h: they compute and store; one more warp loads weights."""
THREADS_A_BLOCK = 32 * (NUM_CONSUMER_WARPS + 1)
"""`kThreads`"""
RESERVED_BYTES = 17_408
"""`kReservedBytes`: of a block's shared memory, before the first page."""
ROW_CHUNK = 16
"""`kRowChunk`: rows whose input is in shared memory at once; larger buckets take a tile chunk by chunk."""
ROW_TILE = 8
"""Rows of one matrix instruction."""
ATTENDED_ROWS = 32
"""`kLanes`: rows whose splits an SM has noted down at once."""
MAX_LOADS_AHEAD = 7
"""One less than `kLoadsInFlight`."""
STATS_SPAN = 32
"""Columns of the head that share statistics: the pair of column groups that an epilogue has in hand."""
SQUARED_COLUMNS = 16
"""`kSquaredColumns`: of a row, whose squares who writes them adds up."""
K_BLOCK = 128
"""K-tiles are whole units of every format."""

ASSERTION = (
    f"static_assert(headrace::kConsumerWarps == {NUM_CONSUMER_WARPS} && "
    f"headrace::kThreads == {THREADS_A_BLOCK} && headrace::kReservedBytes == {RESERVED_BYTES} && "
    f"headrace::kRowChunk == {ROW_CHUNK} && headrace::kLoadsInFlight == {MAX_LOADS_AHEAD + 1} && "
    f"headrace::kSquaredColumns == {SQUARED_COLUMNS}, "
    f'"compiled for other headers");'
)
"""C++, after the headers."""
