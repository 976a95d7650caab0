// Weight gradients that wait for an exchange: what is done when.
#include "base/postponed.hpp"

#include <ATen/ops/ones.h>
#include <gtest/gtest.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "base/autograd.hpp"

namespace upcycle {
namespace {

/// A letter for each weight gradient, in capitals for the input's.
struct Products {
  std::string done;
  Tensor backward(char name) {
    return Postponed::product_backward([this, name] { done += name; },
                                       [this, name] {
                                         done += static_cast<char>(name - 'a' + 'A');
                                         return at::ones({2});
                                       });
  }
};

TEST(Postponed, WithoutAnExchangeNothingWaits) {
  Products p;
  EXPECT_TRUE(p.backward('a').equal(at::ones({2})));
  EXPECT_EQ(p.done, "aA");
  EXPECT_FALSE(Postponed::waiting());
}

TEST(Postponed, WaitsInOrderAndTwoAtMost) {
  Products p;
  {
    const Postponed::Ahead ahead;
    p.backward('a');
    EXPECT_EQ(p.done, "A");
    EXPECT_TRUE(Postponed::waiting());
    p.backward('b'), p.backward('c'), p.backward('d');
    EXPECT_EQ(p.done, "ABCaDb");
    Postponed::finish();
    EXPECT_EQ(p.done, "ABCaDbcd");
    EXPECT_FALSE(Postponed::waiting());
  }
  p.backward('e');
  EXPECT_EQ(p.done, "ABCaDbcdeE") << "no exchange is ahead any more";
}

TEST(Postponed, EachCopyIsAhead) {
  Products p;
  std::optional<Postponed::Ahead> first(std::in_place);
  std::optional<Postponed::Ahead> copy(*first);
  copy = *first;
  first.reset();
  p.backward('a');
  EXPECT_EQ(p.done, "A");
  copy.reset();
  p.backward('b');
  EXPECT_EQ(p.done, "AbB");
  Postponed::drop();
  EXPECT_FALSE(Postponed::waiting());
  EXPECT_EQ(p.done, "AbB") << "dropped, not done";
}

// An op whose backward puts something off, below another that holds an exchange for longer than this backward lasts.
TEST(Postponed, EndsWithItsBackward) {
  for (const bool fails : {false, true}) {
    Products p;
    const Postponed::Ahead ahead;
    const Tensor x = at::ones({2}).requires_grad_();
    const Tensor y = record(x.detach().clone(), {x}, [&](const std::vector<Tensor>&) -> Gradients {
      p.backward('a');
      if (fails) throw std::runtime_error("in backward");
      return {at::ones({2})};
    });
    GraphEnd end(y);
    if (fails) {
      EXPECT_THROW(end.backward(at::ones({2})), std::runtime_error);
    } else {
      end.backward(at::ones({2}));
    }
    EXPECT_EQ(p.done, fails ? "A" : "Aa");
    EXPECT_FALSE(Postponed::waiting());
  }
}

}  // namespace
}  // namespace upcycle
