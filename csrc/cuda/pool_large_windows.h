// Pooling of large windows on a GPU: threads share each.
#pragma once

#include "cpu/pool.h"
#include "cuda/stream.h"

namespace fastnn::cuda {

// Forward passes of windows that are too few, or each too large, for one thread to have one: in planes a warp
// has a window and reads its rows by 16 bytes; on channels_last threads share the elements of a window, each
// for 16 bytes of channels. Each function says whether it takes a call; if so, `wrong` is null or what went
// wrong.
bool pool_large_windows(const MaxPoolArgs& args, Stream stream, const char*& wrong);
bool pool_large_windows(const AvgPoolArgs& args, Stream stream, const char*& wrong);

// The gradient of averages over windows that lie side by side and cover the image: each element gets a copy.
bool pool_large_windows(const AvgPoolBackwardArgs& args, Stream stream, const char*& wrong);

}  // namespace fastnn::cuda
