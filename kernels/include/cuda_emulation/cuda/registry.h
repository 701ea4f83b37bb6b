// Names a source's kernels, at its end, and brings the emulator along.
#pragma once

#include "../registry.h"
