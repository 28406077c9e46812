// A checkpoint, parameters and AdamW's moments, changes devices in the middle of a training run.

#include <memory>
#include <string>
#include <vector>

#include "core/safetensors.h"
#include "cuda/test/model_case.h"
#include "test/temporary_folder.h"

namespace dn::cuda_test {
namespace {

// A few steps of training from where `model` stands; the losses, and the parameters in the end.
std::vector<float> train_on(Model& model, int64_t first_step, int64_t last_step, std::vector<double>* curve) {
  const Batch batch = make_batch({24, 16});
  const LossRows rows = make_rows(40);
  std::vector<float> result;
  for (int64_t step = first_step; step <= last_step; ++step) {
    curve->push_back(train_step(model, batch, rows, step));
  }
  for (size_t i = 0; i < model.parameters().size(); ++i) {
    const std::vector<float> values = parameter(model, i);
    result.insert(result.end(), values.begin(), values.end());
  }
  return result;
}

constexpr Model::Moment kMoments[] = {Model::Moment::kFirst, Model::Moment::kSecond};

// Parameters and moments, to a file and back.
void save(Model& model, const std::string& path) {
  std::vector<SafetensorsWriter::Declaration> declarations;
  for (const Parameter& p : model.parameters()) {
    for (const char* kind : {"", ".m", ".v"}) {
      SafetensorsWriter::Declaration declaration;
      declaration.name = p.name + kind;
      declaration.shape = p.shape;
      declarations.push_back(declaration);
    }
  }
  SafetensorsWriter writer(path, declarations, {});
  for (size_t i = 0; i < model.parameters().size(); ++i) {
    std::vector<float> values = parameter(model, i);
    writer.write(values.data(), model.parameters()[i].count);
    for (const Model::Moment moment : kMoments) {
      model.get_moment(i, moment, values.data());
      writer.write(values.data(), model.parameters()[i].count);
    }
  }
  writer.commit();
}

void load(Model& model, const std::string& path) {
  const SafetensorsFile file(path);
  for (size_t i = 0; i < model.parameters().size(); ++i) {
    const Parameter& p = model.parameters()[i];
    std::vector<float> values(idx(p.count));
    file.read(*file.find(p.name), values.data());
    model.set_parameter(i, values.data());
  }
  model.begin_training();
  for (size_t i = 0; i < model.parameters().size(); ++i) {
    const Parameter& p = model.parameters()[i];
    std::vector<float> values(idx(p.count));
    for (const Model::Moment moment : kMoments) {
      file.read(*file.find(p.name + (moment == Model::Moment::kFirst ? ".m" : ".v")), values.data());
      model.set_moment(i, moment, values.data());
    }
  }
}

// A checkpoint that one device wrote goes on on the other as it would have on the first.
DN_TEST(cuda_model_checkpoints_change_devices) {
  const auto make = [](bool gpu) {
    return std::make_unique<Model>(gpu ? make_cuda_backend(0, Dtype::kF32) : make_cpu_backend(1), kConfig);
  };
  const TemporaryFolder folder;
  const std::string path = folder / "model.safetensors";
  for (const bool gpu_first : {false, true}) {
    const char* const what = gpu_first ? "from CUDA to the CPU" : "from the CPU to CUDA";
    std::vector<double> before, stayed_curve, moved_curve;
    const std::unique_ptr<Model> stayed = make(gpu_first), moved = make(!gpu_first);
    stayed->initialise(5);
    stayed->begin_training();
    train_on(*stayed, 1, 6, &before);
    save(*stayed, path);
    load(*moved, path);
    for (size_t i = 0; i < stayed->parameters().size(); ++i) {
      const size_t n = idx(stayed->parameters()[i].count);
      std::vector<float> a(n), b(n);
      CHECK(parameter(*stayed, i) == parameter(*moved, i));
      for (const Model::Moment moment : kMoments) {
        stayed->get_moment(i, moment, a.data());
        moved->get_moment(i, moment, b.data());
        CHECK(a == b);
      }
    }
    const std::vector<float> expected = train_on(*stayed, 7, 12, &stayed_curve);
    const std::vector<float> got = train_on(*moved, 7, 12, &moved_curve);
    for (size_t i = 0; i < stayed_curve.size(); ++i) {
      CHECK_MSG(std::fabs(moved_curve[i] - stayed_curve[i]) < 2e-5 * stayed_curve[i],
                std::string(what) + ": loss of step " + std::to_string(7 + i) + " is " +
                    std::to_string(moved_curve[i]) + ", without the move " + std::to_string(stayed_curve[i]));
    }
    CHECK_ERROR(got, to_doubles(expected), 2e-4, std::string(what) + ": parameters");
    CHECK(stayed_curve.back() < before.front() - 0.2);
  }
}

}  // namespace
}  // namespace dn::cuda_test
