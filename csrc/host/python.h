// Python as the caller of the ops' libraries (see csrc/caller.h).
#pragma once

#include "caller.h"

namespace knnext {

const Caller* python_caller();

}  // namespace knnext
