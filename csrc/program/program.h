// Programs: calls of kernels over one planned block of memory, checked and prepared once and run many times.
//
// A program is made of a description, int64 numbers one after another; floating-point numbers are there as
// their bits:
//
//   magic, version, level (of isa.h), bytes of the block,
//   number of constants, of inputs, of outputs, of values, of records,
//   of each input and output: element, dims, sizes, strides
//   of each value: base, index, offset, element, dims, sizes, strides
//   of each record: code, number of values, values, number of arguments, arguments
//
// A value is a tensor that lies `offset` bytes behind the start of its base: constant, input or output
// `index`, or the block. Strides are in elements and not negative. A record names values by their numbers, -1
// for none; records.h lists them. Whatever a description says, what does not fit together is refused, and a
// program reads and writes nothing but the memory of its bases.
#pragma once

#include <array>
#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

#include "checks/checks.h"
#include "cpu/context.h"
#include "cpu/isa.h"

namespace fastnn::program {

inline constexpr int64_t kMagic = 0x6d6172676f727066, kVersion = 1;
inline constexpr int64_t kMostDims = 8, kMostBlock = int64_t{1} << 44;

// The first four are those of DType.
enum class Element : int64_t { f32, bf16, f16, f64, i64, i32, boolean, byte };
inline constexpr int64_t kElementCount = 8;
int64_t bytes_of(Element element);

enum class Base : int64_t { constant, input, output, block };
inline constexpr int64_t kBaseCount = 4;

// Of a tensor that a caller hands over or gets.
struct TensorType {
  Element element;
  Sizes sizes, strides;
  int64_t bytes;  // from the first element to the end of the last
};

// Where memory begins at a run: one of its bases and bytes behind it.
struct Place {
  size_t base = 0;  // 0 is no memory: a null pointer
  int64_t offset = 0;
};

struct Value {
  Element element;
  Sizes sizes, strides;
  Place place;
  bool writable, constant;
};

// Memory that a caller keeps as long as the program.
struct Constant {
  const void* data;
  int64_t bytes;
};

// One prepared call.
class Step {
 public:
  Step() = default;
  Step(const Step&) = delete;
  Step& operator=(const Step&) = delete;
  virtual ~Step() = default;
  virtual void run(std::byte* const* bases, const Context& context) const = 0;
};

// The memory of one run.
class Frame;

class Program {
 public:
  // Throws std::runtime_error where the description is refused.
  Program(const int64_t* description, int64_t length, const std::vector<Constant>& constants);
  ~Program();
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  const std::vector<TensorType>& inputs() const { return inputs_; }
  const std::vector<TensorType>& outputs() const { return outputs_; }

  // Of tensors of those types; any number of threads at a time. Of the context it takes threads, not scratch
  // memory. Throws std::runtime_error where an index is outside of an embedding's table, or the level is
  // another.
  void run(const void* const* inputs, void* const* outputs, const Context& context) const;

 private:
  std::unique_ptr<Frame> take() const;
  void give(std::unique_ptr<Frame> frame) const;

  Isa level_;
  int64_t block_bytes_ = 0;
  std::vector<std::byte*> bases_;  // null, then the block, constants, inputs, outputs
  size_t first_input_ = 0, first_output_ = 0;
  std::vector<TensorType> inputs_, outputs_;
  std::vector<std::unique_ptr<Step>> steps_;
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Frame>> idle_;
};

}  // namespace fastnn::program
