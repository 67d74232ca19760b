// Programs as torch sees them: made of a description and constants, run by number.
#include "program/program.h"

#include <memory>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

#include "ops/common.h"

namespace fastnn::ops {
namespace {

using program::Element;
using program::TensorType;

constexpr ScalarType kScalarTypes[program::kElementCount] = {
    ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double,
    ScalarType::Long,  ScalarType::Int,      ScalarType::Bool, ScalarType::Byte};

ScalarType scalar_type(Element element) { return kScalarTypes[static_cast<size_t>(element)]; }

struct Entry {
  std::vector<Tensor> constants;  // keep what the program reads
  program::Program program;
  std::vector<int32_t> input_types;  // torch's numbers of them
};

// By number. A run holds its entry, so that one which is dropped meanwhile ends afterwards.
std::shared_mutex g_mutex;
std::unordered_map<int64_t, std::shared_ptr<const Entry>>& entries() {
  static auto* all = new std::unordered_map<int64_t, std::shared_ptr<const Entry>>;  // outlives all callers
  return *all;
}

std::shared_ptr<const Entry> entry_of(int64_t number) {
  const std::shared_lock lock(g_mutex);
  const auto found = entries().find(number);
  FASTNN_CHECK(found != entries().end(), "there is no program ", number);
  return found->second;
}

// From the first element to the end of the last.
int64_t bytes_of(const Tensor& t) {
  if (t.numel() == 0) return 0;
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  return (last + 1) * static_cast<int64_t>(t.element_size());
}

int64_t make(Tensor description, std::vector<Tensor> constants) {
  FASTNN_CHECK(description.is_cpu() && description.scalar_type() == ScalarType::Long &&
                   description.dim() == 1 && description.is_contiguous(),
               "a program's description is a dense int64 tensor of 1 dimension on the CPU");
  std::vector<program::Constant> memory;
  for (const Tensor& t : constants) {
    FASTNN_CHECK(t.is_cpu(), "a program's constants are on the CPU");
    memory.push_back({t.const_data_ptr(), bytes_of(t)});
  }
  const auto* numbers = static_cast<const int64_t*>(description.const_data_ptr());
  const auto entry =
      std::shared_ptr<Entry>(new Entry{std::move(constants), {numbers, description.numel(), memory}, {}});
  for (const TensorType& t : entry->program.inputs())
    entry->input_types.push_back(
        torch::stable::detail::to<int32_t>(torch::stable::detail::from(scalar_type(t.element))));
  static int64_t last = 0;
  const std::unique_lock lock(g_mutex);
  entries()[++last] = entry;
  return last;
}

void drop(int64_t number) {
  std::shared_ptr<const Entry> last;  // ends without the lock
  const std::unique_lock lock(g_mutex);
  const auto found = entries().find(number);
  if (found == entries().end()) return;
  last = std::move(found->second);
  entries().erase(found);
}

bool is_of_type(const Tensor& t, const TensorType& type, int32_t scalar) {
  int32_t found = 0;
  int64_t dims = 0, *sizes = nullptr, *strides = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &found));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(t.get(), &dims));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t.get(), &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &strides));
  if (found != scalar || dims != static_cast<int64_t>(type.sizes.size()) || !t.is_cpu()) return false;
  for (size_t d = 0; d < type.sizes.size(); ++d) {
    if (sizes[d] != type.sizes[d] || strides[d] != type.strides[d]) return false;
  }
  return true;
}

bool are_of_types(const Entry& entry, const Tensor* inputs) {
  const auto& types = entry.program.inputs();
  for (size_t i = 0; i < types.size(); ++i) {
    if (!is_of_type(inputs[i], types[i], entry.input_types[i])) return false;
  }
  return true;
}

Tensor result_of(const TensorType& t) { return empty_strided(scalar_type(t.element), t.sizes, t.strides); }

std::vector<Tensor> run(int64_t number, std::vector<Tensor> inputs) {
  const std::shared_ptr<const Entry> entry = entry_of(number);
  const program::Program& p = entry->program;
  FASTNN_CHECK(inputs.size() == p.inputs().size(), "a program of ", p.inputs().size(), " inputs got ",
               inputs.size());
  FASTNN_CHECK(are_of_types(*entry, inputs.data()),
               "an input of a program is of other sizes, strides, dtype or device than the program is for");
  std::vector<const void*> in;
  std::vector<void*> out;
  std::vector<Tensor> made;
  for (const Tensor& t : inputs) in.push_back(t.const_data_ptr());
  for (const TensorType& t : p.outputs()) {
    made.push_back(result_of(t));
    out.push_back(made.back().mutable_data_ptr());
  }
  p.run(in.data(), out.data(), TorchContext());
  return made;
}

// Of one input and one result, as most programs are: a list of tensors takes the dispatcher half a
// microsecond. None where the program is for an input of another kind: asking beforehand takes Python as
// long.
std::optional<Tensor> run_one(int64_t number, Tensor input) {
  const std::shared_ptr<const Entry> entry = entry_of(number);
  const program::Program& p = entry->program;
  FASTNN_CHECK(p.inputs().size() == 1 && p.outputs().size() == 1, "a program of ", p.inputs().size(),
               " inputs and ", p.outputs().size(), " results is not run on one input");
  if (!are_of_types(*entry, &input)) return std::nullopt;
  Tensor made = result_of(p.outputs()[0]);
  const void* in = input.const_data_ptr();
  void* out = made.mutable_data_ptr();
  p.run(&in, &out, TorchContext());
  return made;
}

}  // namespace

FASTNN_LIBRARY(STABLE_TORCH_LIBRARY_FRAGMENT, m) {
  m.def("_program_make(Tensor description, Tensor[] constants) -> int");
  m.def("_program_drop(int program) -> ()");
  m.def("_program_run(int program, Tensor[] inputs) -> Tensor[]");
  m.def("_program_run_one(int program, Tensor input) -> Tensor?");
}
FASTNN_LIBRARY(STABLE_TORCH_LIBRARY_IMPL, CompositeExplicitAutograd, m) {
  m.impl("_program_make", TORCH_BOX(&make));
  m.impl("_program_drop", TORCH_BOX(&drop));
  m.impl("_program_run", TORCH_BOX(&run));
  m.impl("_program_run_one", TORCH_BOX(&run_one));
}

}  // namespace fastnn::ops
