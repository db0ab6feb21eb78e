#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "xlm_ds/index_format.hpp"

/// A reader of .idx files as plain as docs/formats.md describes them, to compare the core's with; and a writer.
namespace xlm_ds_fuzz {

using namespace std::string_view_literals;

inline constexpr auto kMmap = "MMIDIDX\0\0"sv;
inline constexpr auto kLazy = "TNTIDX\0\0"sv;

template <typename T>
T number_at(std::string_view bytes, std::size_t at) {
  T value;
  std::memcpy(&value, bytes.substr(at, sizeof(T)).data(), sizeof(T));
  return value;
}

struct IndexTwin {
  xlm_ds::IndexKind kind = xlm_ds::IndexKind::mmap;
  std::uint64_t dtype = 0;
  std::uint64_t width = 0;             // bytes of an element
  std::vector<std::int64_t> lengths;  // in elements
  std::vector<std::uint64_t> starts;     // lazy: in elements, and the total; else in bytes of the .bin
  std::vector<std::uint64_t> documents;  // megatron: first sequences, and the end
  std::vector<std::uint64_t> dimensions;  // lazy: 0, 1, 2 and so on

  [[nodiscard]] bool lazy() const { return kind == xlm_ds::IndexKind::lazy; }

  /// In elements; none if it is between two.
  [[nodiscard]] std::optional<std::uint64_t> start(std::size_t i) const {
    if (lazy()) return starts[i];
    return starts[i] % width == 0 ? std::optional(starts[i] / width) : std::nullopt;
  }

  /// Whether sequence i has one dimension.
  [[nodiscard]] bool is_flat(std::size_t i) const { return !lazy() || (dimensions[i] == i && dimensions[i + 1] == i + 1); }

  /// The bytes the .bin should have; none if what opening looks at cannot be so of any .bin.
  [[nodiscard]] std::optional<std::uint64_t> data_bytes() const {
    if (kind == xlm_ds::IndexKind::megatron) {
      if (dtype >= 9 || documents.empty()) return std::nullopt;
      if (documents.front() != 0 || documents.back() != lengths.size()) return std::nullopt;
    }
    if (lengths.empty()) return 0;
    if (starts.front() != 0) return std::nullopt;
    constexpr std::uint64_t kBeyondAnyFile = std::uint64_t{1} << 56;
    const auto length = static_cast<std::uint64_t>(lengths.back());  // a negative one is beyond it too
    const auto first = start(lengths.size() - 1).value_or(kBeyondAnyFile + 1);
    if (length > kBeyondAnyFile || first > kBeyondAnyFile) return std::nullopt;
    return (first + length) * width;
  }

  /// Whether every sequence starts where the one before it ends, from the first byte to the last, and so do documents.
  [[nodiscard]] bool whole() const {
    if (!std::is_sorted(documents.begin(), documents.end())) return false;
    if (lazy() && dimensions.front() != 0) return false;
    const std::uint64_t tokens = *data_bytes() / width;
    std::uint64_t at = 0;
    for (std::size_t i = 0; i < lengths.size(); ++i) {
      if (!is_flat(i) || lengths[i] < 0 || start(i) != at || static_cast<std::uint64_t>(lengths[i]) > tokens - at) return false;
      at += static_cast<std::uint64_t>(lengths[i]);
    }
    if (lazy() && starts.back() != tokens) return false;
    return true;
  }
};

inline std::uint64_t width_of(std::uint64_t dtype) {
  switch (dtype) {
    case 1: case 2: return 1;
    case 3: case 8: return 2;
    case 4: case 9: return 4;
    case 5: case 10: return 8;
    default: return 0;
  }
}

/// What the file says, if it is whole in itself.
inline std::optional<IndexTwin> parse_index(std::string_view bytes) {
  IndexTwin twin;
  std::uint64_t count = 0;
  std::size_t lengths_at = 0, starts_at = 0;
  if (bytes.starts_with(kMmap)) {
    if (bytes.size() < 26 || number_at<std::uint64_t>(bytes, 9) != 1) return std::nullopt;
    twin.dtype = number_at<std::uint8_t>(bytes, 17);
    count = number_at<std::uint64_t>(bytes, 18);
    if (count > bytes.size()) return std::nullopt;
    std::uint64_t documents = 0;
    if (bytes.size() != 26 + 12 * count) {
      if (bytes.size() < 34) return std::nullopt;
      twin.kind = xlm_ds::IndexKind::megatron;
      documents = number_at<std::uint64_t>(bytes, 26);
      const std::uint64_t fitting = 34 + 12 * count + 8 * std::min<std::uint64_t>(documents, bytes.size());
      if (bytes.size() != fitting && bytes.size() != fitting + count) return std::nullopt;
    }
    lengths_at = twin.kind == xlm_ds::IndexKind::megatron ? 34 : 26;
    starts_at = lengths_at + 4 * count;
    for (std::uint64_t i = 0; i < documents; ++i) {
      twin.documents.push_back(number_at<std::uint64_t>(bytes, starts_at + 8 * (count + i)));
    }
  } else if (bytes.starts_with(kLazy)) {
    twin.kind = xlm_ds::IndexKind::lazy;
    if (bytes.size() < 48 || number_at<std::uint64_t>(bytes, 8) != 1) return std::nullopt;
    twin.dtype = number_at<std::uint64_t>(bytes, 16);
    count = number_at<std::uint64_t>(bytes, 32);
    if (count > bytes.size() || bytes.size() != 48 + 16 * (count + 1) + 8 * count) return std::nullopt;
    if (number_at<std::uint64_t>(bytes, 24) != width_of(twin.dtype)) return std::nullopt;
    if (number_at<std::uint64_t>(bytes, 40) != count) return std::nullopt;
    starts_at = 48 + 8 * (count + 1);
    lengths_at = starts_at + 8 * (count + 1);
  } else {
    return std::nullopt;
  }
  twin.width = width_of(twin.dtype);
  if (twin.width == 0) return std::nullopt;
  for (std::uint64_t i = 0; i < count; ++i) {
    twin.starts.push_back(number_at<std::uint64_t>(bytes, starts_at + 8 * i));
    twin.lengths.push_back(twin.lazy() ? number_at<std::int64_t>(bytes, lengths_at + 8 * i)
                                       : number_at<std::int32_t>(bytes, lengths_at + 4 * i));
  }
  for (std::uint64_t i = 0; twin.lazy() && i <= count; ++i) twin.dimensions.push_back(number_at<std::uint64_t>(bytes, 48 + 8 * i));
  if (twin.lazy()) twin.starts.push_back(number_at<std::uint64_t>(bytes, starts_at + 8 * count));
  return twin;
}

template <typename T>
void put(std::string& bytes, T value) {
  bytes.append(reinterpret_cast<const char*>(&value), sizeof(T));
}

inline std::string mmap_index(std::uint8_t dtype, const std::vector<std::int32_t>& lengths) {
  std::string bytes(kMmap);
  put(bytes, std::uint64_t{1});
  put(bytes, dtype);
  put(bytes, std::uint64_t{lengths.size()});
  for (const auto length : lengths) put(bytes, length);
  std::uint64_t start = 0;
  for (const auto length : lengths) {
    put(bytes, start);
    start += static_cast<std::uint64_t>(length) * width_of(dtype);
  }
  return bytes;
}

/// With documents as given: first sequences, and the end.
inline std::string megatron_index(std::uint8_t dtype, const std::vector<std::int32_t>& lengths,
                                  const std::vector<std::uint64_t>& documents) {
  std::string bytes = mmap_index(dtype, lengths);
  std::string entries;
  put(entries, std::uint64_t{documents.size()});
  bytes.insert(26, entries);
  for (const auto document : documents) put(bytes, document);
  return bytes;
}

inline std::string lazy_index(std::uint64_t dtype, const std::vector<std::uint64_t>& lengths) {
  std::string bytes(kLazy);
  put(bytes, std::uint64_t{1});
  put(bytes, dtype);
  put(bytes, width_of(dtype));
  for (int twice = 0; twice < 2; ++twice) put(bytes, std::uint64_t{lengths.size()});
  for (std::uint64_t i = 0; i <= lengths.size(); ++i) put(bytes, i);
  std::uint64_t start = 0;
  put(bytes, start);
  for (const auto length : lengths) put(bytes, start += length);
  for (const auto length : lengths) put(bytes, length);
  return bytes;
}

}  // namespace xlm_ds_fuzz
