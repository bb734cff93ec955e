// How a call from Rust ends: with null, or with the message of an exception in memory that the caller
// frees.
#pragma once

#include <cstring>
#include <exception>

#include <c10/util/Exception.h>

template <typename F>
static char *caught(F f) {
  try {
    f();
    return nullptr;
  } catch (const c10::Error &e) {
    return strdup(e.what_without_backtrace());
  } catch (const std::exception &e) {
    return strdup(e.what());
  } catch (...) {
    return strdup("an exception without a message");
  }
}
