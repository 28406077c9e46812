// From a tensor of a checkpoint to a parameter of a model, one at a time, whatever the two hold: fp32, fp16
// or bf16, or int8 with its scales.
#pragma once

#include <cstddef>

#include "core/model.h"
#include "core/safetensors.h"

namespace dn {

// `scales`: for an I8 tensor, the F32 tensor with a scale per output column; null for any other. Throws
// Error(kCheckpoint) naming the tensor and what is wrong: counts, dtypes, scales that are negative or not
// finite, values outside -127 .. 127, products of the two that are not finite.
void load_parameter(Model& model, size_t index, const SafetensorsFile& file, const TensorEntry& tensor,
                    const TensorEntry* scales);

}  // namespace dn
