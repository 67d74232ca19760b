// Pooling of small square windows on a GPU, in planes.
#pragma once

#include "cpu/pool.h"
#include "cuda/stream.h"

namespace fastnn::cuda {

// Windows of 2 x 2 elements without padding and of 3 x 3 with padding of 1 to the left, at a stride of 2, of
// elements of 2 and 4 bytes, in planes [n, c, rows, columns] of a multiple of 4 columns that are twice the
// windows: a thread has 16 bytes of columns and the windows over them, and those that overlap further down
// too. Each function says whether it takes a call; if so, `wrong` is null or what went wrong.
bool pool_rows(const MaxPoolArgs& args, Stream stream, const char*& wrong);
bool pool_rows(const MaxPoolBackwardArgs& args, Stream stream, const char*& wrong);
bool pool_rows(const AvgPoolArgs& args, Stream stream, const char*& wrong);
bool pool_rows(const AvgPoolBackwardArgs& args, Stream stream, const char*& wrong);

}  // namespace fastnn::cuda
