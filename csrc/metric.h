#pragma once

namespace knnext {

enum class Metric : int { kL2 = 0, kIp = 1 };

}  // namespace knnext
