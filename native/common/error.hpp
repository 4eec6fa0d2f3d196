// Errors that leave the native core. Set-up throws; running operations end in an Outcome.
#pragma once

#include <stdexcept>
#include <string>

namespace commlib {

// Not enough memory of some kind; the message carries the values and the way out.
class CapacityException : public std::runtime_error {
 public:
  CapacityException(const std::string& message, size_t needed, size_t available)
      : std::runtime_error(message), needed_(needed), available_(available) {}
  size_t needed() const { return needed_; }
  size_t available() const { return available_; }

 private:
  size_t needed_;
  size_t available_;
};

class ConfigException : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

}  // namespace commlib
