// Pooling of small square windows on a GPU, in the layout channels_last.
#pragma once

#include "cpu/pool.h"
#include "cuda/stream.h"

namespace fastnn::cuda {

// Windows of 2 x 2 elements at a stride of 2, and of 3 x 3 at a stride of 1, 2 or 3, without dilation, of
// channels that fill 16 bytes: a thread has 16 bytes of channels of some windows one below the other, or of
// the elements that these begin on. Each function says whether it takes a call; if so, `wrong` is null or
// what went wrong.
bool pool_squares(const MaxPoolArgs& args, Stream stream, const char*& wrong);
bool pool_squares(const MaxPoolBackwardArgs& args, Stream stream, const char*& wrong);
bool pool_squares(const AvgPoolArgs& args, Stream stream, const char*& wrong);
bool pool_squares(const AvgPoolBackwardArgs& args, Stream stream, const char*& wrong);

}  // namespace fastnn::cuda
