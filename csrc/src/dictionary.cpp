#include "xlm_ds/dictionary.hpp"

namespace xlm_ds {

Dictionary::Dictionary(const std::vector<std::string>& symbols) : size_(symbols.size()) {
  ids_.reserve(symbols.size());
  for (std::size_t id = 0; id < symbols.size(); ++id) {
    const auto number = numbers_.insert(symbols[id]);
    if (number == ids_.size()) ids_.push_back(0);
    ids_[number] = narrow_or_throw<std::uint32_t>(id, "ids of a dictionary");
  }
}

}  // namespace xlm_ds
