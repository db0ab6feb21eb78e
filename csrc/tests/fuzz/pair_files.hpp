#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "files.hpp"
#include "index_twin.hpp"

/// A pair of files of any bytes, and what a plain reader makes of it. The input's layout: two bytes of the target's own, the
/// size of the dictionary (two bytes), the .bin's size in bytes (two bytes; 0xFFFF for the one that fits, cut or filled up
/// with zeros), the .idx's size (two bytes), the .idx and the .bin.
namespace xlm_ds_fuzz {

using Ids = std::vector<std::int64_t>;

inline std::int64_t id_at(std::string_view data, std::uint64_t i, const IndexTwin& twin) {
  const std::size_t at = i * twin.width;
  // By unsigned arithmetic, which wraps: a uint64 beyond int64 becomes a negative id, and so is refused.
  const auto stored = [&]() -> std::uint64_t {
    switch (twin.dtype) {
      case 1: return number_at<std::uint8_t>(data, at);
      case 2: return static_cast<std::uint64_t>(number_at<std::int8_t>(data, at));
      case 3: return static_cast<std::uint64_t>(number_at<std::int16_t>(data, at));
      case 4: return static_cast<std::uint64_t>(number_at<std::int32_t>(data, at));
      case 8: return number_at<std::uint16_t>(data, at);
      case 9: return number_at<std::uint32_t>(data, at);
      default: return number_at<std::uint64_t>(data, at);
    }
  }();
  return static_cast<std::int64_t>(stored - (twin.lazy() ? 1 : 0));
}

struct PairFiles {
  static constexpr std::size_t kHeaderBytes = 8;
  static constexpr std::uint16_t kFitting = 0xFFFF;
  static constexpr std::uint64_t kLargestData = 1024;
  static constexpr std::int64_t kLargestVocabulary = 512;  // most of the time would go into counts

  std::int64_t vocab_size;
  std::string_view idx;
  std::string bin;
  std::optional<IndexTwin> twin;  // none if the .idx does not fit itself
  bool fits = false;              // the .idx itself, and the .bin
  Ids ids;                        // of the .bin, if it fits

  /// `input` is not shorter than the header, and outlives the object.
  explicit PairFiles(std::string_view input)
      : vocab_size(number_at<std::uint16_t>(input, 2) % kLargestVocabulary),
        idx(input.substr(kHeaderBytes, number_at<std::uint16_t>(input, 6))),
        bin(input.substr(kHeaderBytes + idx.size())),
        twin(parse_index(idx)) {
    const auto fitting = twin ? twin->data_bytes() : std::nullopt;
    const auto wanted = number_at<std::uint16_t>(input, 4);
    if (wanted != kFitting) {
      bin.resize(std::min<std::size_t>(wanted, kLargestData));
    } else if (fitting && *fitting <= kLargestData) {
      bin.resize(*fitting);
    }
    fits = fitting == bin.size();
    for (std::uint64_t i = 0; fits && i < bin.size() / twin->width; ++i) ids.push_back(id_at(bin, i, *twin));
  }

  /// As train.ar.
  void write_to(const Folder& folder) const {
    folder.write("train.ar.idx", idx);
    folder.write("train.ar.bin", bin);
  }

  static std::string input_of(std::uint8_t first, std::uint8_t second, std::uint16_t vocab_size, const std::string& index,
                              const std::string& data) {
    std::string bytes;
    put(bytes, first);
    put(bytes, second);
    put(bytes, vocab_size);
    put(bytes, kFitting);
    put(bytes, static_cast<std::uint16_t>(index.size()));
    return bytes + index + data;
  }
};

/// A negative id is not.
inline bool all_below(const Ids& ids, std::uint64_t vocab_size) {
  return std::all_of(ids.begin(), ids.end(), [&](auto id) { return static_cast<std::uint64_t>(id) < vocab_size; });
}

}  // namespace xlm_ds_fuzz
