// Pooling on a GPU with the images' rows in shared memory.
#pragma once

#include "cpu/pool.h"
#include "cuda/stream.h"

namespace fastnn::cuda {

// Rows follow one another without a gap, so that they move by 16 bytes whatever their width: a block copies
// those that it needs into shared memory, works there, and writes its results from there. For the layout [n,
// c, rows, columns], and channels_last whose channels do not fill 16 bytes; not for data that are not aligned
// to 16 bytes, and for rows that shared memory does not hold. Each function says whether it takes a call; if
// so, `wrong` is null or what went wrong.
bool pool_staged(const MaxPoolArgs& args, Stream stream, const char*& wrong);
bool pool_staged(const MaxPoolBackwardArgs& args, Stream stream, const char*& wrong);
bool pool_staged(const AvgPoolArgs& args, Stream stream, const char*& wrong);
bool pool_staged(const AvgPoolBackwardArgs& args, Stream stream, const char*& wrong);

}  // namespace fastnn::cuda
