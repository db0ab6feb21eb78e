#include "xlm_ds/bpe_splitter.hpp"

#include "xlm_ds/dictionary.hpp"

namespace xlm_ds {

std::string_view BpeSplitter::apply(std::string_view text) {
  output_.clear();
  const auto make = [this](std::string_view word) {
    pieces_.clear();
    bpe_->split(word, scratch_, pieces_);
    return std::string_view(pieces_);
  };
  const auto copy = [this](const char* begin, const char* end) {
    for (; begin != end; ++begin) output_.append(*begin);
  };
  convert_words(text, cache_, output_, make, copy);
  output_.make_room(kReadableAfter);
  return {output_.elements().data(), output_.elements().size()};
}

}  // namespace xlm_ds
