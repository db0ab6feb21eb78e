#pragma once

#include <string>
#include <string_view>

#include "xlm_ds/bpe.hpp"
#include "xlm_ds/bpe_words.hpp"
#include "xlm_ds/word_cache.hpp"

namespace xlm_ds {

/// Bpe::apply on one piece of text after another, with what it has seen before in a cache. One per thread.
class BpeSplitter {
 public:
  /// `bpe` must outlive the splitter.
  explicit BpeSplitter(const Bpe& bpe) : bpe_(&bpe) {}

  /// The pieces of `text`, valid until the next call; kReadableAfter bytes (dictionary.hpp) after them are readable.
  [[nodiscard]] std::string_view apply(std::string_view text);

 private:
  const Bpe* bpe_;
  Bpe::Scratch scratch_;
  WordCache cache_;
  std::string pieces_;
  WordOutput<char> output_;
};

}  // namespace xlm_ds
