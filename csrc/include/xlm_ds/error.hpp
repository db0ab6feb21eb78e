#pragma once

#include <concepts>
#include <limits>
#include <stdexcept>
#include <string>

namespace xlm_ds {

/// Something the user gave is wrong: a file's content, a value. The message is one sentence that says what was found,
/// what was expected, where, and what to do; the caller shows it as it is and exits with code 2.
class InputError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Converts between integer types; throws InputError naming `what` if the value does not fit.
template <std::integral To, std::integral From>
[[nodiscard]] To narrow_or_throw(From value, const char* what) {
  const auto narrowed = static_cast<To>(value);
  if (static_cast<From>(narrowed) != value || ((narrowed < To{}) != (value < From{}))) {
    throw InputError(std::string(what) + ": " + std::to_string(value) + " does not fit; at most " +
                     std::to_string(std::numeric_limits<To>::max()) + " can be stored");
  }
  return narrowed;
}

}  // namespace xlm_ds
