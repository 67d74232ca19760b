#include "program/program.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#include "program/records.h"

namespace fastnn::program {

int64_t bytes_of(Element element) {
  constexpr int64_t kBytes[kElementCount] = {4, 2, 2, 8, 8, 4, 1, 1};
  return kBytes[static_cast<size_t>(element)];
}

// ---- memory of a run ----

namespace {

constexpr size_t kAlignment = 64;

struct Free {
  void operator()(std::byte* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<std::byte, Free>;

Memory allocate(size_t bytes) {
  const size_t rounded = std::max((bytes + kAlignment - 1) / kAlignment * kAlignment, kAlignment);
  Memory memory(static_cast<std::byte*>(std::aligned_alloc(kAlignment, rounded)));
  FASTNN_CHECK(memory != nullptr, "no memory for ", rounded, " bytes of a program");
  return memory;
}

// Scratch memory of one kernel after another. What a run lacked is there at the next.
class Scratch {
 public:
  void* take(size_t bytes) {
    const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    used_ += rounded;
    if (used_ <= size_) return memory_.get() + used_ - rounded;
    more_.push_back(allocate(rounded));
    return more_.back().get();
  }
  void next_kernel() {
    most_ = std::max(most_, used_);
    used_ = 0;
  }
  void next_run() {
    next_kernel();
    if (most_ <= size_) return;
    more_.clear();
    memory_.reset();
    size_ = 0;
    memory_ = allocate(most_);
    size_ = most_;
  }

 private:
  Memory memory_;
  size_t size_ = 0, used_ = 0, most_ = 0;
  std::vector<Memory> more_;
};

}  // namespace

class Frame {
 public:
  Frame(const std::vector<std::byte*>& all, int64_t bytes)
      : bases(all), block_(allocate(static_cast<size_t>(bytes))) {
    bases[1] = block_.get();
  }

  std::vector<std::byte*> bases;
  Scratch scratch;

 private:
  Memory block_;
};

std::unique_ptr<Frame> Program::take() const {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!idle_.empty()) {
      std::unique_ptr<Frame> frame = std::move(idle_.back());
      idle_.pop_back();
      return frame;
    }
  }
  return std::make_unique<Frame>(bases_, block_bytes_);
}

void Program::give(std::unique_ptr<Frame> frame) const {
  constexpr size_t kMostIdle = 8;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (idle_.size() < kMostIdle) idle_.push_back(std::move(frame));
}

void Program::run(const void* const* inputs, void* const* outputs, const Context& given) const {
  FASTNN_CHECK(current_isa() == level_, "a program for the level ", isa_name(level_), " cannot run at ",
               isa_name(current_isa()));
  std::unique_ptr<Frame> frame = take();
  std::byte** bases = frame->bases.data();
  for (size_t i = 0; i < inputs_.size(); ++i)
    bases[first_input_ + i] = const_cast<std::byte*>(static_cast<const std::byte*>(inputs[i]));
  for (size_t i = 0; i < outputs_.size(); ++i) bases[first_output_ + i] = static_cast<std::byte*>(outputs[i]);
  struct With : Context {
    Frame* frame;
    const Context* threads;
  } context{given, frame.get(), &given};
  context.self = &context;
  context.allocate = [](void* self, size_t bytes) {
    return static_cast<With*>(self)->frame->scratch.take(bytes);
  };
  context.run = [](void* self, int workers, void (*task)(void*, int), void* closure) {
    const Context& threads = *static_cast<With*>(self)->threads;
    threads.run(threads.self, workers, task, closure);
  };
  for (const auto& step : steps_) {
    step->run(bases, context);
    frame->scratch.next_kernel();
  }
  frame->scratch.next_run();
  give(std::move(frame));
}

// ---- descriptions ----

namespace {

class Reader {
 public:
  Reader(const int64_t* numbers, int64_t length) : next_(numbers), end_(numbers + length) {}

  int64_t number(const char* what) {
    FASTNN_CHECK(next_ < end_, "a program's description ends before ", what);
    return *next_++;
  }
  int64_t number(const char* what, int64_t least, int64_t most) {
    const int64_t found = number(what);
    FASTNN_CHECK(found >= least && found <= most, "a program's description has ", found, " as ", what,
                 ", expected ", least, " to ", most);
    return found;
  }
  // How many of something follow, each of at least one number.
  int64_t count(const char* what) { return number(what, 0, end_ - next_); }
  std::vector<int64_t> numbers(int64_t count, const char* what) {
    FASTNN_CHECK(count <= end_ - next_, "a program's description ends before ", what);
    std::vector<int64_t> out(next_, next_ + count);
    next_ += count;
    return out;
  }
  bool at_end() const { return next_ == end_; }

 private:
  const int64_t *next_, *end_;
};

TensorType tensor_type(Reader& in) {
  TensorType t;
  t.element = static_cast<Element>(in.number("an element", 0, kElementCount - 1));
  const int64_t dims = in.number("a number of dimensions", 0, kMostDims);
  t.sizes = in.numbers(dims, "sizes");
  t.strides = in.numbers(dims, "strides");
  int64_t last = 0;
  bool fits = true, empty = false;
  for (size_t d = 0; d < t.sizes.size(); ++d) {
    int64_t reach = 0;
    fits &= t.sizes[d] >= 0 && t.sizes[d] <= kMostElements && t.strides[d] >= 0;
    empty |= t.sizes[d] == 0;
    fits &= !__builtin_mul_overflow(t.sizes[d] - 1, t.strides[d], &reach) || t.sizes[d] == 0;
    if (t.sizes[d] > 0) fits &= !__builtin_add_overflow(last, reach, &last);
  }
  fits &= empty || last < kMostElements;
  FASTNN_CHECK(fits, "a program's tensor has sizes or strides beyond what memory can hold");
  count_of(t.sizes);
  t.bytes = empty ? 0 : (last + 1) * bytes_of(t.element);
  return t;
}

}  // namespace

Program::Program(const int64_t* description, int64_t length, const std::vector<Constant>& constants) {
  Reader in(description, length);
  FASTNN_CHECK(in.number("its magic number") == kMagic, "this is no description of a program");
  const int64_t version = in.number("its version");
  FASTNN_CHECK(version == kVersion, "a program of version ", version, ", expected ", kVersion);
  level_ = static_cast<Isa>(in.number("its level", 0, kIsaLevels - 1));
  FASTNN_CHECK(level_ == current_isa(), "a program for the level ", isa_name(level_), ", where ",
               isa_name(current_isa()), " runs");
  block_bytes_ = in.number("the bytes of its block", 0, kMostBlock);
  const int64_t constant_count =
      in.number("a number of constants", 0, static_cast<int64_t>(constants.size()));
  FASTNN_CHECK(constant_count == static_cast<int64_t>(constants.size()), "a program of ", constant_count,
               " constants got ", constants.size());
  const int64_t input_count = in.count("a number of inputs"), output_count = in.count("a number of outputs"),
                value_count = in.count("a number of values"), record_count = in.count("a number of records");
  for (int64_t i = 0; i < input_count; ++i) inputs_.push_back(tensor_type(in));
  for (int64_t i = 0; i < output_count; ++i) outputs_.push_back(tensor_type(in));

  bases_ = {nullptr, nullptr};
  std::vector<int64_t> bytes = {0, block_bytes_};
  for (const Constant& c : constants) {
    bases_.push_back(const_cast<std::byte*>(static_cast<const std::byte*>(c.data)));
    bytes.push_back(c.bytes);
  }
  first_input_ = bases_.size();
  first_output_ = first_input_ + inputs_.size();
  for (const TensorType& t : inputs_) bytes.push_back(t.bytes);
  for (const TensorType& t : outputs_) bytes.push_back(t.bytes);
  bases_.resize(bytes.size());

  std::vector<Value> values;
  values.reserve(static_cast<size_t>(value_count));
  for (int64_t i = 0; i < value_count; ++i) {
    const auto base = static_cast<Base>(in.number("a value's base", 0, kBaseCount - 1));
    const int64_t counts[kBaseCount] = {constant_count, input_count, output_count, 1};
    const size_t firsts[kBaseCount] = {2, first_input_, first_output_, 1};
    const auto which = static_cast<size_t>(base);
    const int64_t index = in.number("the index of a value's base", 0, counts[which] - 1);
    const size_t at = firsts[which] + static_cast<size_t>(index);
    const int64_t offset = in.number("a value's offset", 0, bytes[at]);
    TensorType t = tensor_type(in);
    FASTNN_CHECK(offset % bytes_of(t.element) == 0, "value ", i, " of a program lies between elements");
    FASTNN_CHECK(t.bytes <= bytes[at] - offset, "value ", i,
                 " of a program reaches past the end of its memory");
    const bool writable = base == Base::output || base == Base::block;
    values.push_back({t.element,
                      std::move(t.sizes),
                      std::move(t.strides),
                      {at, offset},
                      writable,
                      base == Base::constant});
    if (base == Base::constant) {
      FASTNN_CHECK(reinterpret_cast<uintptr_t>(constants[static_cast<size_t>(index)].data) %
                           static_cast<uintptr_t>(bytes_of(t.element)) ==
                       0,
                   "constant ", index, " of a program is not aligned");
    }
    // Results whose elements share memory would be larger than what holds them.
    if (writable)
      FASTNN_CHECK(elements_of(values.back()) <= bytes[at], "value ", i,
                   " of a program has more elements than its memory holds");
  }
  for (int64_t i = 0; i < record_count; ++i) {
    const auto code = static_cast<Code>(in.number("a record's code", 0, kCodeCount - 1));
    std::vector<const Value*> named;
    for (int64_t n = in.count("a record's number of values"); n > 0; --n) {
      const int64_t v = in.number("a record's value", -1, value_count - 1);
      named.push_back(v < 0 ? nullptr : &values[static_cast<size_t>(v)]);
    }
    const int64_t arguments = in.count("a record's number of arguments");
    steps_.push_back(
        step_of(Record(i, code, std::move(named), in.numbers(arguments, "a record's arguments"))));
  }
  FASTNN_CHECK(in.at_end(), "a program's description goes on behind its last record");
}

Program::~Program() = default;

}  // namespace fastnn::program
