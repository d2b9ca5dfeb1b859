#pragma once

#include <functional>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

// Enough of a test framework: TEST(a_sentence) { CHECK(...); CHECK_EQ(got, want); }
// A failed check is reported and the test goes on.
namespace check {

struct Test {
    const char* name;
    void (*body)();
};

inline std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}

inline int& failures() {
    static int count = 0;
    return count;
}

struct Register {
    Register(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

inline void fail(const char* file, int line, const std::string& text) {
    std::cerr << file << ":" << line << ": " << text << "\n";
    ++failures();
}

template <class Got, class Want>
void equal(const Got& got, const Want& want, const char* text, const char* file, int line) {
    if (!(got == want)) {
        std::ostringstream message;
        message << text << " is " << got << ", expected " << want;
        fail(file, line, message.str());
    }
}

}  // namespace check

#define TEST(name)                                             \
    static void name();                                        \
    static const check::Register register_##name(#name, name); \
    static void name()

#define CHECK(condition) \
    ((condition) ? void() : check::fail(__FILE__, __LINE__, #condition " does not hold"))

#define CHECK_EQ(got, want) check::equal(got, want, #got, __FILE__, __LINE__)
