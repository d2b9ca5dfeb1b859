#pragma once

#include <string>

#include "moe/cache.h"
#include "moe/schedule.h"

namespace quernstone::bind {

moe::Policy parse_schedule_policy(const std::string& name);
moe::cache::Policy parse_cache_policy(const std::string& name);

}  // namespace quernstone::bind
