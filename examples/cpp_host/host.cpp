// Runs what `funcreg.torch.export` has written, without Python:
//
//     host call FILE METHOD INPUTS OUTPUTS             one call of a method ("forward" of a step)
//     host train FILE START DATA STEPS SIZES FINAL     a training step, again and again
//
// INPUTS, START and DATA are dicts of tensors by name as `torch.save` writes them; of OUTPUTS and FINAL
// `dict(torch.load(path))` makes such dicts. START has the inputs of the first step, all but the batch. DATA has the
// examples: rows of the inputs that make the batch. SIZES are batch sizes, "8,13,32,1", taken in turn.
//
// An output that has the name of an input is the next step's input: this is how parameters and optimizer state go
// from step to step. All other outputs are metrics; they are printed, and FINAL has those of every step.

#include <torch/script.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using Tensors = c10::Dict<std::string, at::Tensor>;

// What an exception says, in one line: a file's own words about a wrong input come after TorchScript's traceback.
std::string message(const std::exception& error) {
  if (const auto* own = dynamic_cast<const c10::Error*>(&error)) return own->what_without_backtrace();
  const std::string text = error.what();
  const size_t end = text.find_last_not_of('\n');
  const size_t begin = text.find_last_of('\n', end);
  return text.substr(begin + 1, end - begin);
}

torch::jit::Module load(const std::string& path) {
  if (!std::ifstream(path, std::ios::binary)) throw std::runtime_error("cannot open " + path);
  try {
    return torch::jit::load(path);
  } catch (const std::exception& error) {
    throw std::runtime_error(path + " is not an exported function: " + message(error));
  }
}

Tensors read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot open " + path);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  try {
    Tensors tensors;
    for (const auto& entry : torch::jit::pickle_load(bytes).toGenericDict())
      tensors.insert(entry.key().toStringRef(), entry.value().toTensor());
    return tensors;
  } catch (const std::exception& error) {
    throw std::runtime_error(path + " is not a dict of tensors as torch.save writes it: " + message(error));
  }
}

// Pairs, since the pickle of a C++ dict names a function of torch.jit, which `torch.load` takes from no stranger.
void write(const std::string& path, const Tensors& tensors) {
  std::vector<at::IValue> pairs;
  for (const auto& entry : tensors) pairs.emplace_back(std::make_tuple(entry.key(), entry.value()));
  const std::vector<char> bytes = torch::jit::pickle_save(c10::ivalue::Tuple::create(std::move(pairs)));
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!file.flush()) throw std::runtime_error("cannot write " + path);
}

Tensors call(const torch::jit::Module& module, const std::string& method, const Tensors& inputs) {
  const auto found = module.find_method(method);
  if (!found) throw std::runtime_error("the file has no method " + method + " (a step has forward)");
  return c10::impl::toTypedDict<std::string, at::Tensor>((*found)({inputs}).toGenericDict());
}

int64_t parse(const std::string& what, const std::string& text) {
  int64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size() || number < 1)
    throw std::runtime_error(what + " must be 1 or more, a whole number, got '" + text + "'");
  return number;
}

std::vector<int64_t> parse_sizes(const std::string& text) {
  std::vector<int64_t> sizes;
  std::istringstream stream(text + ",");
  for (std::string part; std::getline(stream, part, ',');) sizes.push_back(parse("sizes", part));
  return sizes;
}

// The examples as batches, in order; what is too few for a batch at the end is left out, and the next begins anew.
class Batches {
 public:
  Batches(Tensors data, std::vector<int64_t> sizes) : data_(std::move(data)), sizes_(std::move(sizes)) {
    const int64_t largest = *std::max_element(sizes_.begin(), sizes_.end());
    for (const auto& entry : data_) {
      if (entry.value().dim() == 0 || entry.value().size(0) < largest)
        throw std::runtime_error("the data " + entry.key() + " must have " + std::to_string(largest) + " rows or more");
      if (rows_ >= 0 && entry.value().size(0) != rows_)
        throw std::runtime_error("the data " + entry.key() + " must have as many rows as the others");
      rows_ = entry.value().size(0);
    }
  }

  void next(Tensors& inputs) {
    const int64_t size = sizes_[turn_++ % sizes_.size()];
    if (begin_ + size > rows_) begin_ = 0;
    for (const auto& entry : data_) inputs.insert_or_assign(entry.key(), entry.value().narrow(0, begin_, size));
    begin_ += size;
  }

 private:
  Tensors data_;
  std::vector<int64_t> sizes_;
  int64_t rows_ = -1, begin_ = 0;
  size_t turn_ = 0;
};

Tensors train(const torch::jit::Module& module, Tensors inputs, Batches batches, int64_t steps) {
  std::map<std::string, std::vector<at::Tensor>> metrics;
  std::vector<double> seconds;
  Tensors state;
  for (int64_t step = 1; step <= steps; ++step) {
    batches.next(inputs);
    const auto start = std::chrono::steady_clock::now();
    const Tensors outputs = call(module, "forward", inputs);
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    for (const auto& entry : outputs) {
      if (inputs.contains(entry.key())) {
        inputs.insert_or_assign(entry.key(), entry.value());
        state.insert_or_assign(entry.key(), entry.value());
      } else {
        metrics[entry.key()].push_back(entry.value());
      }
    }
    if (step == 1 || step % 20 == 0) {
      std::cout << "step " << step;
      for (const auto& [name, values] : metrics)
        if (values.back().numel() == 1) std::cout << "  " << name << " " << values.back().item<double>();
      std::cout << "\n";
    }
  }
  for (const auto& [name, values] : metrics) state.insert(name, at::stack(values));
  std::sort(seconds.begin(), seconds.end());
  std::cout << "microseconds per step: " << 1e6 * seconds[seconds.size() / 2] << "\n";
  return state;
}

int run(const std::vector<std::string>& arguments) {
  const bool one = arguments.size() == 5 && arguments[0] == "call";
  if (!one && !(arguments.size() == 7 && arguments[0] == "train")) {
    std::cerr << "usage: host call FILE METHOD INPUTS OUTPUTS\n"
                 "       host train FILE START DATA STEPS SIZES FINAL\n";
    return 2;
  }
  const c10::InferenceMode no_autograd;
  const torch::jit::Module module = load(arguments[1]);
  if (one) {
    write(arguments[4], call(module, arguments[2], read(arguments[3])));
    return 0;
  }
  const int64_t steps = parse("steps", arguments[4]);
  Batches batches(read(arguments[3]), parse_sizes(arguments[5]));
  write(arguments[6], train(module, read(arguments[2]), std::move(batches), steps));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    std::cerr << "host: " << message(error) << "\n";
  }
  return 1;
}
