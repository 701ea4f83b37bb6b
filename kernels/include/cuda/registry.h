// Names a source's kernels, at its end. The emulation finds them by this list; CUDA by their symbols.
#pragma once

#define HEADRACE_KERNELS(...)
