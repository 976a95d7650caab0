#pragma once
// A model's training state that is a pure function of names and indices: whoever reads a part of it can judge it alone.
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include "base/error.hpp"
#include "model/stage.hpp"
#include "train/snapshot.hpp"
#include "train/start.hpp"

namespace upcycle {

/// What tensor `name` holds in the state `kind` ("master", "exp_avg", ...).
inline void known_content(const std::string& kind, const ParameterSpec& spec, const Box& box, Tensor target) {
  ParameterSpec renamed = spec;
  renamed.name = kind + "/" + spec.name;
  renamed.role = Role::feed_forward;  // norms would be ones
  Architecture deep;
  deep.layers = 3;                    // of which the spread of some depends
  initialise(renamed, box, deep, 7, target);
}

inline Tensor known(const std::string& kind, const ParameterSpec& spec, const Box& box) {
  Tensor target = at::empty(box.size, at::kFloat);
  known_content(kind, spec, box, target);
  return target;
}

/// The whole of a bucket in state `kind`, of which a rank may keep a part.
inline Tensor known_bucket(const std::string& kind, Stage& stage, const Bucket& bucket) {
  Tensor flat = at::zeros({bucket.size});
  for (size_t i = 0; i < bucket.weights.size(); ++i) {
    const Weight& weight = stage.weights().all()[bucket.weights[i]];
    const Tensor view = flat.narrow(0, bucket.runs[i].begin, bucket.runs[i].size()).view(weight.shape);
    for (const Part& part : weight.parts) known_content(kind, part.spec, part.box, part.of(view));
  }
  return flat;
}

inline Tensor known_own(const std::string& kind, Stage& stage, const Bucket& bucket) {
  return known_bucket(kind, stage, bucket).narrow(0, bucket.own.begin, bucket.own.size());
}

/// A stage with its weights and optimizer on one layout; all zeros until fill() or a restore.
struct KnownState {
  KnownState(const Architecture& architecture, const ParallelSection& parallel, at::ScalarType compute)
      : mesh(Grid(parallel, world_size())), stage(architecture, make_layout(architecture, mesh.grid(), parallel), mesh) {
    stage.weights().allocate(compute, at::kCPU, parallel.zero);
  }

  void fill() {
    fill_masters(stage.weights(), [](const ParameterSpec& s, const Box& b, Tensor t) { known_content("master", s, b, t); });
    optimizer.emplace(stage.weights(), OptimizerSection{}, 1.0);
    for (size_t i = 0; i < stage.weights().buckets().size(); ++i) {
      optimizer->exp_avg(i).copy_(known_own("exp_avg", stage, stage.weights().buckets()[i]));
      optimizer->exp_avg_sq(i).copy_(known_own("exp_avg_sq", stage, stage.weights().buckets()[i]));
    }
    optimizer->updates().fill_(5.0);
  }

  TrainingState restore(const CheckpointReader& reader) {
    if (!optimizer) optimizer.emplace(stage.weights(), OptimizerSection{}, 1.0);
    return restore_checkpoint(reader, stage.weights(), &*optimizer);
  }

  /// Bit for bit what fill() made.
  void expect_known() {
    EXPECT_EQ(optimizer->updates().item<float>(), 5.0f);
    for (size_t i = 0; i < stage.weights().buckets().size(); ++i) {
      const Bucket& bucket = stage.weights().buckets()[i];
      EXPECT_TRUE(at::equal(bucket.values, known_bucket("master", stage, bucket).to(bucket.dtype)));
      EXPECT_TRUE(at::equal(bucket.masters, known_own("master", stage, bucket)));
      EXPECT_TRUE(at::equal(optimizer->exp_avg(i), known_own("exp_avg", stage, bucket)));
      EXPECT_TRUE(at::equal(optimizer->exp_avg_sq(i), known_own("exp_avg_sq", stage, bucket)));
    }
  }

  Mesh mesh;
  Stage stage;
  std::optional<Optimizer> optimizer;
};

/// The record of a checkpoint of nothing but `architecture`.
inline RunRecord known_record(const Architecture& architecture) {
  RunRecord record;
  record.run_id = "test";
  record.architecture = to_hf(architecture, nlohmann::json::object());
  record.run = nlohmann::json::object();
  return record;
}

}  // namespace upcycle
