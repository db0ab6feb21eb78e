#pragma once

#include <cstdint>

namespace xlm_ds {

/// Ids of fairseq's masked-LM dictionary: five special symbols, then the words.
inline constexpr std::int64_t kBos = 0, kPad = 1, kEos = 2, kUnk = 3, kMask = 4, kSpecials = 5;

}  // namespace xlm_ds
