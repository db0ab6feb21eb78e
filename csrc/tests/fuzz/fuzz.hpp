#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "xlm_ds/error.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

/// What the fuzz targets share. A target turns any bytes into calls of the core and compares every answer with a simple
/// twin of its own; driver.cpp (any compiler) or libFuzzer (clang) makes up the bytes.
namespace xlm_ds_fuzz {

/// Valid inputs to start from; each target defines its own.
std::vector<std::string> seeds();

/// Inputs the core took, and those it refused: a target that refuses everything tests little, and must be seen to.
struct Outcomes {
  std::uint64_t accepted = 0;
  std::uint64_t rejected = 0;
};
inline Outcomes& outcomes() {
  static Outcomes counts;
  return counts;
}

/// Ends the program, as a sanitizer does, if a law does not hold.
inline void require(bool holds, const char* law) {
  if (holds) return;
  std::fprintf(stderr, "broken: %s\n", law);
  std::abort();
}

/// True if `attempt` returns and false if it throws InputError, whose message must be one line; what else it throws ends
/// the program.
template <typename Attempt>
bool accepts(Attempt attempt) {
  try {
    attempt();
  } catch (const xlm_ds::InputError& error) {
    const std::string_view message = error.what();
    require(!message.empty() && message.find('\n') == std::string_view::npos, "a refusal says why in one line");
    return false;
  }
  return true;
}

/// Counts an input by whether the core took it.
inline void count(bool accepted) { ++(accepted ? outcomes().accepted : outcomes().rejected); }

/// Splits at the first `separator`; the second half is empty if there is none.
inline std::pair<std::string_view, std::string_view> cut(std::string_view input, char separator) {
  const std::size_t at = input.find(separator);
  if (at == std::string_view::npos) return {input, {}};
  return {input.substr(0, at), input.substr(at + 1)};
}

inline std::vector<std::string_view> split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  for (std::size_t end = text.find(separator); end != std::string_view::npos; end = text.find(separator)) {
    parts.push_back(text.substr(0, end));
    text.remove_prefix(end + 1);
  }
  parts.push_back(text);
  return parts;
}

/// The last line may be without its end.
inline std::vector<std::string_view> lines_of(std::string_view text) {
  auto lines = split(text, '\n');
  if (lines.back().empty()) lines.pop_back();
  return lines;
}

inline std::string_view text_of(const std::uint8_t* data, std::size_t size) {
  return {reinterpret_cast<const char*>(data), size};
}

}  // namespace xlm_ds_fuzz
