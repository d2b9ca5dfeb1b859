#include <cstdlib>
#include <iostream>

#include "runtime_stress.h"

// quernstone_stress [executions [seed]]
int main(int argc, char** argv) {
    const std::int64_t executions = argc > 1 ? std::atoll(argv[1]) : 1000000;
    const auto seed = static_cast<std::uint64_t>(argc > 2 ? std::atoll(argv[2]) : 1);
    const std::int64_t wrong = stress::run(executions, seed);
    std::cout << executions << " plans executed, " << wrong << " with wrong bits\n";
    return wrong == 0 ? 0 : 1;
}
