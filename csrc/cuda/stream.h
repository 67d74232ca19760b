// How the ops name a stream without CUDA's headers.
#pragma once

namespace fastnn::cuda {

using Stream = void*;  // a cudaStream_t

}  // namespace fastnn::cuda
