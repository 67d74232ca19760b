// Pooling of planes, the layout [n, c, rows, columns], on a GPU.
#pragma once

#include "cpu/pool.h"
#include "cuda/stream.h"

namespace fastnn::cuda {

// Rows of a plane follow one another without a gap, so that they move by 16 bytes whatever their width: a
// block copies those that it needs into shared memory, works there, and writes its results from there. Not
// for channels_last, for data that are not aligned to 16 bytes, and for rows that shared memory does not
// hold. Each function says whether it takes a call; if so, `wrong` is null or what went wrong.
bool pool_planes(const MaxPoolArgs& args, Stream stream, const char*& wrong);
bool pool_planes(const MaxPoolBackwardArgs& args, Stream stream, const char*& wrong);
bool pool_planes(const AvgPoolArgs& args, Stream stream, const char*& wrong);
bool pool_planes(const AvgPoolBackwardArgs& args, Stream stream, const char*& wrong);

}  // namespace fastnn::cuda
