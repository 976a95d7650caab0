// golden_logits MODEL IDS OUT: our logits, fp32 on the CPU, of the model in MODEL (a Hugging Face directory or a checkpoint) for the
// int64 tensor "ids" [B, S] in IDS; written as "logits" [B*S, V] to OUT/model.safetensors. For tests in Python.
#include <iostream>

#include "golden/model.hpp"
#include "train/dense_source.hpp"

int main(int argc, char** argv) try {
  using namespace upcycle;
  if (argc != 4) return 2;
  const WeightSource source(argv[1]);
  source.check();
  Model model(source.architecture(), as_they_are([&](const std::string& name, const Box& box) { return source.read(name, box); }));
  const Tensor logits = model.logits(SafetensorsReader(argv[2]).read("ids"));
  SafetensorsWriter out(argv[3], {{"logits", at::kFloat, logits.sizes().vec()}}, uint64_t{1} << 40, {});
  out.write(logits);
  out.finish();
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
