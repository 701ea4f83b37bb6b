// Everything that a generated kernel needs.
#pragma once

#include "cuda/ops/advance.h"
#include "cuda/ops/attention.h"
#include "cuda/ops/embed.h"
#include "cuda/ops/linear.h"
#include "cuda/ops/load.h"
#include "cuda/ops/results.h"
#include "cuda/registry.h"
