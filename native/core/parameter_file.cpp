// Loading of parameters; see parameter_file.h.

#include "core/parameter_file.h"

#include <cmath>
#include <vector>

#include "core/error.h"
#include "core/int8.h"
#include "core/json.h"
#include "core/workspace.h"

namespace dn {
namespace {

[[noreturn]] void refuse(const SafetensorsFile& file, const TensorEntry& tensor, const std::string& what) {
  throw Error(Code::kCheckpoint, file.path() + ": tensor " + shown_name(tensor.name) + ": " + what);
}

}  // namespace

void load_parameter(Model& model, size_t index, const SafetensorsFile& file, const TensorEntry& tensor,
                    const TensorEntry* scales) {
  const Parameter& parameter = model.parameters().at(index);
  if (tensor.count() != parameter.count) {
    refuse(file, tensor,
           "holds " + std::to_string(tensor.count()) + " values, parameter " + parameter.name + " needs " +
               std::to_string(parameter.count));
  }
  if ((tensor.dtype == "I8") != (scales != nullptr)) {
    refuse(file, tensor,
           scales ? "is " + tensor.dtype + ", only I8 comes with scales" : "is I8 without scales");
  }
  if (!scales) {
    model.set_parameter(
        index, [&](int64_t begin, int64_t count, float* out) { file.read_range(tensor, begin, count, out); });
    return;
  }
  const int64_t columns = model.int8_columns(index);
  if (scales->dtype != "F32" || scales->count() != columns) {
    refuse(file, *scales,
           "holds " + std::to_string(scales->count()) + " " + scales->dtype + " scales, " + tensor.name +
               " needs " + std::to_string(columns) + " F32");
  }
  std::vector<float> factors(static_cast<size_t>(columns));
  file.read(*scales, factors.data());
  for (int64_t n = 0; n < columns; ++n) {
    const float factor = factors[static_cast<size_t>(n)];
    if (factor >= 0 && std::isfinite(factor)) continue;
    refuse(file, *scales,
           "scale " + std::to_string(n) + " is " + std::to_string(factor) +
               ", expected a finite number, 0 or more");
  }
  HostTemporary memory(model.backend(), static_cast<size_t>(parameter.count), "reading " + parameter.name);
  int8_t* const values = memory.as<int8_t>();
  file.read_int8(tensor, values);
  for (int64_t i = 0; i < parameter.count; ++i) {
    if (values[i] != -128) continue;
    refuse(file, tensor, "the value at index " + std::to_string(i) + " is -128, expected -127 to 127");
  }
  // Values of a column are neighbours in wte, and `columns` apart elsewhere.
  const int64_t K = parameter.count / columns;
  for (int64_t n = 0; n < columns; ++n) {
    const float factor = factors[static_cast<size_t>(n)];
    if (std::isfinite(kInt8Most * factor)) continue;
    for (int64_t k = 0; k < K; ++k) {
      const int64_t i = index == kWte ? n * K + k : k * columns + n;
      if (std::isfinite(static_cast<float>(values[i]) * factor)) continue;
      refuse(file, tensor,
             "the value at index " + std::to_string(i) + " is " + std::to_string(values[i]) +
                 " times the scale " + std::to_string(factor) + ", expected a finite product");
    }
  }
  model.set_int8(index, values, factors.data());
}

}  // namespace dn
