#pragma once
#include <string>
#include <vector>

#include "model/catalogue.hpp"

namespace upcycle {

/// How a Hugging Face directory spells the experts of a layer.
enum class ExpertForm {
  one_by_one,  ///< "...experts.3.up_proj.weight" [fe, h]: the hub, transformers 4, vLLM; the only form that is written
  fused,       ///< "...experts.gate_up_proj" [N, 2*fe, h] and "...experts.down_proj" [N, h, fe]: transformers 5 in memory, mergekit
};

/// A tensor of a Hugging Face directory and the part of one of our parameters that lies in it.
struct HfTensor {
  std::string name;
  Shape shape;
  Box ours;            ///< of our parameter
  int64_t begin = 0;   ///< fused: where the part begins along dim 1 of the tensor
};

/// The tensors that hold `spec`: one of the same name and shape; for experts those of `form`, in the order of the experts.
std::vector<HfTensor> hf_tensors(const ParameterSpec& spec, ExpertForm form);

}  // namespace upcycle
