// Runs a frozen model from a file, without Python and without torch:
//
//   ninja -C build run_saved
//   build/run_saved model.safetensors output.bin input.bin ...
//
// The inputs' and results' elements lie one after another in their files, as numpy's tofile() writes them. Of
// the kinds of calls in the file the first runs whose graph is one program.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "program/program.h"

namespace {

// ---- JSON: objects, lists, strings and whole numbers ----

struct Json {
  std::string text;  // of a string, a number or a word
  std::vector<Json> list;
  std::map<std::string, Json> object;

  const Json& operator[](const std::string& name) const {
    const auto found = object.find(name);
    if (found == object.end()) throw std::runtime_error("the file lacks " + name);
    return found->second;
  }
  int64_t number() const { return std::strtoll(text.c_str(), nullptr, 10); }
};

class Parser {
 public:
  explicit Parser(std::string_view text) : left_(text) {}

  Json value(int depth = 0) {
    if (depth > 100) throw std::runtime_error("JSON too deep");
    Json out;
    const char first = next();
    if (first == '{' || first == '[') {
      const char end = first == '{' ? '}' : ']';
      take();
      while (next() != end) {
        if (first == '{') {
          const std::string name = string();
          expect(':');
          out.object[name] = value(depth + 1);
        } else {
          out.list.push_back(value(depth + 1));
        }
        if (next() != end) expect(',');
      }
      take();
    } else if (first == '"') {
      out.text = string();
    } else {
      while (!left_.empty() && std::strchr(",]} \n", left_[0]) == nullptr) out.text += take();
    }
    return out;
  }

 private:
  char take() {
    if (left_.empty()) throw std::runtime_error("JSON that ends too early");
    const char c = left_[0];
    left_.remove_prefix(1);
    return c;
  }
  char next() {
    while (!left_.empty() && std::isspace(static_cast<unsigned char>(left_[0]))) left_.remove_prefix(1);
    return left_.empty() ? '\0' : left_[0];
  }
  void expect(char c) {
    if (next() != c) throw std::runtime_error(std::string("JSON without a ") + c);
    take();
  }
  std::string string() {
    expect('"');
    std::string out;
    for (char c = take(); c != '"'; c = take()) {
      if (c == '\\') {
        c = take();
        if (c == 'u') {  // only layers' names have any
          for (int i = 0; i < 4; ++i) take();
          c = '?';
        } else if (c == 'n') {
          c = '\n';
        }
      }
      out += c;
    }
    return out;
  }

  std::string_view left_;
};

// ---- files ----

struct File {
  explicit File(const char* path) {
    const int file = open(path, O_RDONLY);
    struct stat status{};
    if (file < 0 || fstat(file, &status) != 0) throw std::runtime_error(std::string("cannot read ") + path);
    size = static_cast<size_t>(status.st_size);
    void* at = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, 0);
    close(file);
    if (at == MAP_FAILED) throw std::runtime_error(std::string("cannot map ") + path);
    data = static_cast<const char*>(at);
  }
  const char* data;  // as long as the process
  size_t size;
};

// One thread; scratch memory is the program's.
fastnn::Context one_thread() {
  fastnn::Context context;
  context.tile_registers = fastnn::current_isa() == fastnn::Isa::amx;
  context.run = [](void*, int workers, void (*task)(void*, int), void* closure) {
    for (int worker = 0; worker < workers; ++worker) task(closure, worker);
  };
  return context;
}

void run(int count, char** names) {
  if (count < 3) throw std::runtime_error("expected: model.safetensors output.bin input.bin ...");
  const File file(names[1]);
  uint64_t header = 0;
  if (file.size < 8) throw std::runtime_error("no safetensors file");
  std::memcpy(&header, file.data, 8);
  if (header > file.size - 8) throw std::runtime_error("a file that is cut off");
  const Json tensors = Parser({file.data + 8, header}).value();
  const char* elements = file.data + 8 + header;
  const uint64_t bytes = file.size - 8 - header;
  const Json saved = Parser(tensors["__metadata__"]["fastnn"].text).value();

  for (const Json& kind : saved["kinds"].list) {
    const Json& described = kind["program"];
    if (described.object.empty()) continue;
    std::vector<int64_t> description;
    for (const Json& number : described["description"].list) description.push_back(number.number());
    // The library chooses every algorithm, at whatever level this processor has.
    if (description.size() > 2) description[2] = static_cast<int64_t>(fastnn::current_isa());
    std::vector<fastnn::program::Constant> constants;
    for (const Json& name : described["constants"].list) {
      const auto& offsets = tensors[name.text]["data_offsets"].list;
      if (offsets.size() != 2) throw std::runtime_error("a tensor without its place");
      const auto begin = static_cast<uint64_t>(offsets[0].number()),
                 end = static_cast<uint64_t>(offsets[1].number());
      if (begin > end || end > bytes) throw std::runtime_error("a tensor past the end of the file");
      constants.push_back({elements + begin, static_cast<int64_t>(end - begin)});
    }
    const fastnn::program::Program program(description.data(), static_cast<int64_t>(description.size()),
                                           constants);

    std::vector<std::vector<char>> inputs, outputs;
    std::vector<const void*> in;
    std::vector<void*> out;
    for (size_t i = 0; i < program.inputs().size(); ++i) {
      if (static_cast<int>(i) + 3 >= count) throw std::runtime_error("a file for each input is expected");
      std::ifstream from(names[i + 3], std::ios::binary);
      inputs.emplace_back(std::istreambuf_iterator<char>(from), std::istreambuf_iterator<char>());
      if (static_cast<int64_t>(inputs.back().size()) != program.inputs()[i].bytes)
        throw std::runtime_error(std::string(names[i + 3]) + " is of another size than the input");
    }
    for (const auto& input : inputs) in.push_back(input.data());
    for (const auto& type : program.outputs()) outputs.emplace_back(static_cast<size_t>(type.bytes));
    for (auto& output : outputs) out.push_back(output.data());

    const fastnn::Context context = one_thread();
    program.run(in.data(), out.data(), context);
    const auto start = std::chrono::steady_clock::now();
    constexpr int kRuns = 10;
    for (int i = 0; i < kRuns; ++i) program.run(in.data(), out.data(), context);
    const std::chrono::duration<double, std::micro> spent = std::chrono::steady_clock::now() - start;
    std::printf("%.1f us a run at %s\n", spent.count() / kRuns, fastnn::isa_name(fastnn::current_isa()));
    std::ofstream to(names[2], std::ios::binary);
    for (const auto& output : outputs) to.write(output.data(), static_cast<std::streamsize>(output.size()));
    return;
  }
  throw std::runtime_error("no kind of call in the file is one program");
}

}  // namespace

int main(int count, char** names) {
  try {
    run(count, names);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
