#include "train/loss_spikes.hpp"

#include <ATen/ops/cat.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <ATen/ops/where.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "base/autograd.hpp"
#include "base/error.hpp"

namespace upcycle {

LossSpikes::LossSpikes(double factor, at::Device device)
    : factor_(factor), loss_W_(at::full({kWindow}, std::numeric_limits<double>::quiet_NaN(), at::TensorOptions(at::kDouble).device(device))) {}

Tensor LossSpikes::judge(const Tensor& loss, const Tensor& finite) {
  const Unrecorded guard;
  const Tensor known_W = loss_W_.isfinite(), number = known_W.sum(at::kDouble);
  const auto sum = [&](const Tensor& x_W) { return at::where(known_W, x_W, 0.0).sum(); };
  const Tensor mean = sum(loss_W_) / number, deviation = (sum((loss_W_ - mean).square()) / (number - 1)).sqrt();
  const Tensor spike = (loss > mean + factor_ * deviation).logical_and(number >= static_cast<double>(kWindow / 2));
  const Tensor good = finite.logical_and(loss.isfinite()).logical_and(spike.logical_not());
  loss_W_ = at::where(good, at::cat({loss_W_.narrow(0, 1, kWindow - 1), loss.view({1})}), loss_W_);
  return spike;
}

nlohmann::json LossSpikes::state() const {
  nlohmann::json losses = nlohmann::json::array();
  if (factor_ == 0) return losses;
  const Tensor host_W = loss_W_.cpu();
  for (int64_t i = 0; i < kWindow; ++i) {
    if (const double loss = host_W.const_data_ptr<double>()[i]; std::isfinite(loss)) losses.push_back(loss);
  }
  return losses;
}

void LossSpikes::restore(const nlohmann::json& losses) {
  std::vector<double> window(kWindow, std::numeric_limits<double>::quiet_NaN());
  if (losses.is_array()) {
    const size_t kept = std::min(losses.size(), window.size());
    for (size_t i = 0; i < kept; ++i) {
      const nlohmann::json& loss = losses[losses.size() - kept + i];
      if (!loss.is_number()) fail("the checkpoint's training.losses has ", loss.dump(), ", no number: the manifest is damaged");
      window[window.size() - kept + i] = loss.get<double>();
    }
  }
  loss_W_ = at::from_blob(window.data(), {kWindow}, at::kDouble).clone().to(loss_W_.device());
}

}  // namespace upcycle
