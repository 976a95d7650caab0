#include "train/tokenizer.hpp"

#include <gtest/gtest.h>

#include <cstdlib>
#include <nlohmann/json.hpp>

#include "support/scratch.hpp"

namespace upcycle {
namespace {

std::string utf8(int code) {
  if (code < 0x80) return {static_cast<char>(code)};
  return {static_cast<char>(0xC0 | code >> 6), static_cast<char>(0x80 | (code & 63))};
}

/// A byte-level BPE without merges: one token a byte, token b + 1 for byte b, so that characters are split over tokens. Bytes are spelled
/// as GPT-2 does: those that are printable in Latin-1 as themselves, the others as U+0100 and following.
std::string one_token_a_byte() {
  nlohmann::json vocab = {{"<end>", 0}};
  for (int byte = 0, other = 256; byte < 256; ++byte) {
    const bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    vocab[utf8(printable ? byte : other++)] = byte + 1;
  }
  return nlohmann::json{{"version", "1.0"},
                        {"added_tokens", {{{"id", 0}, {"content", "<end>"}, {"special", true}, {"single_word", false}, {"lstrip", false}, {"rstrip", false}, {"normalized", false}}}},
                        {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}}},
                        {"decoder", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}}},
                        {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", nlohmann::json::array()}}}}
      .dump();
}

class TokenizerOfBytes : public testing::Test {
 protected:
  void SetUp() override { store(folder_ / "tokenizer.json", one_token_a_byte()); }
  std::string mistake(const std::filesystem::path& directory) {
    try {
      Tokenizer tokenizer(directory);
    } catch (const UserError& error) {
      return error.what();
    }
    return "none";
  }
  Scratch folder_;
};

const std::string kWords = "h\u00e9llo \U0001F99C \u65e5\u672c\n\"quoted\" \\ end";

TEST_F(TokenizerOfBytes, ThereAndBack) {
  Tokenizer tokenizer(folder_.path());
  EXPECT_EQ(tokenizer.vocabulary(), 257);
  const std::vector<int64_t> ids = tokenizer.encode(kWords);
  ASSERT_EQ(ids.size(), kWords.size());
  for (size_t i = 0; i < ids.size(); ++i) EXPECT_EQ(ids[i], static_cast<uint8_t>(kWords[i]) + 1);
  EXPECT_EQ(tokenizer.decode(ids), kWords);
  EXPECT_EQ(tokenizer.decode({0, 66}), "<end>A") << "special tokens are shown";
  EXPECT_EQ(tokenizer.encode(""), std::vector<int64_t>{});
  EXPECT_THROW(tokenizer.encode("\xff\xfe"), UserError);
  EXPECT_EQ(tokenizer.decode(tokenizer.encode("goes on")), "goes on") << "after a mistake, too";
}

TEST_F(TokenizerOfBytes, MegabytesAtOnce) {
  Tokenizer tokenizer(folder_.path());
  std::string much;
  while (much.size() < (2 << 20)) much += kWords;
  const std::vector<int64_t> ids = tokenizer.encode(much);
  ASSERT_EQ(ids.size(), much.size());
  EXPECT_EQ(tokenizer.decode(ids), much);
}

TEST_F(TokenizerOfBytes, AStreamHandsOnWholeCharacters) {
  Tokenizer tokenizer(folder_.path());
  TextStream stream(tokenizer, tokenizer.encode("before"));
  std::string all;
  std::vector<std::string> pieces;
  for (const int64_t id : tokenizer.encode(kWords)) {
    const std::string piece = stream.push(id);
    EXPECT_EQ(piece.find("\xEF\xBF\xBD"), std::string::npos) << "half a character: " << all << piece;
    if (!piece.empty()) pieces.push_back(piece);
    all += piece;
  }
  EXPECT_EQ(all + stream.rest(), kWords);
  EXPECT_EQ(pieces.at(1), "\u00e9");
  EXPECT_EQ(pieces.at(6), "\U0001F99C");

  // What never becomes a character: told at the end, and nothing before it is lost.
  TextStream broken(tokenizer, {});
  EXPECT_EQ(broken.push('a' + 1), "a");
  EXPECT_EQ(broken.push(0xF0 + 1), "");
  EXPECT_EQ(broken.push(0x9F + 1), "");
  EXPECT_EQ(broken.rest(), "\xEF\xBF\xBD");
}

TEST_F(TokenizerOfBytes, WhatIsWrongIsNamed) {
  EXPECT_NE(mistake(folder_ / "absent").find("no tokenizer.json there"), std::string::npos);
  const std::filesystem::path bad = folder_ / "bad";
  std::filesystem::create_directory(bad);
  store(bad / "tokenizer.json", "{");
  const std::string words = mistake(bad);
  EXPECT_NE(words.find("bad/tokenizer.json: not a tokenizer that `tokenizers` can read"), std::string::npos) << words;

  const char* before = std::getenv("UPCYCLE_PYTHON");
  const std::string kept = before ? before : "";
  setenv("UPCYCLE_PYTHON", "/nowhere/python", 1);
  EXPECT_NE(mistake(folder_.path()).find("can't start /nowhere/python "), std::string::npos);
  setenv("UPCYCLE_PYTHON", "false", 1);   // a program that says nothing
  EXPECT_NE(mistake(folder_.path()).find("ended (exit code 1)"), std::string::npos) << mistake(folder_.path());
  before ? setenv("UPCYCLE_PYTHON", kept.c_str(), 1) : unsetenv("UPCYCLE_PYTHON");
}

TEST(EndTokens, AsTransformersReadsThem) {
  const Scratch folder;
  const nlohmann::json config = {{"eos_token_id", 7}};
  EXPECT_EQ(end_tokens(folder.path(), config), std::set<int64_t>{7});
  EXPECT_EQ(end_tokens(folder.path(), nlohmann::json::object()), std::set<int64_t>{});
  store(folder / "generation_config.json", R"({"eos_token_id": [3, 5]})");
  EXPECT_EQ(end_tokens(folder.path(), config), (std::set<int64_t>{3, 5}));
  store(folder / "generation_config.json", "{}");
  EXPECT_EQ(end_tokens(folder.path(), config), std::set<int64_t>{});
  store(folder / "generation_config.json", R"({"eos_token_id": "x"})");
  EXPECT_THROW(end_tokens(folder.path(), config), UserError);
  store(folder / "generation_config.json", "no json");
  EXPECT_THROW(end_tokens(folder.path(), config), UserError);
}

}  // namespace
}  // namespace upcycle
