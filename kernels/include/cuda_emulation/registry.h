// Names a source's kernels, at its end.
#pragma once

#include "operations.h"

#define HEADRACE_KERNELS(...)
