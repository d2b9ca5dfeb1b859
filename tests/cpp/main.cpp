#include <iostream>

#include "check.h"

int main() {
    int failed_tests = 0;
    for (const check::Test& test : check::tests()) {
        const int before = check::failures();
        test.body();
        const bool failed = check::failures() != before;
        failed_tests += failed ? 1 : 0;
        std::cout << (failed ? "FAILED " : "passed ") << test.name << "\n";
    }
    std::cout << check::tests().size() << " tests, " << failed_tests << " failed\n";
    return failed_tests == 0 ? 0 : 1;
}
